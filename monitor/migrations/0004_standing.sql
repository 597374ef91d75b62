-- Who resubmits a drop and is not known yet waits as well, for a row that shows somebody else until then. The order in which
-- they posted, and the sender that stood in the row then: what somebody has changed since is his.
ALTER TABLE wa_monitor.pending ADD COLUMN position bigint GENERATED ALWAYS AS IDENTITY;
ALTER TABLE wa_monitor.pending ADD COLUMN standing text;
