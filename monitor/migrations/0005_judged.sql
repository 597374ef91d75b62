-- What there should be none of is looked up at each count and each start: senders that were judged LIDs by their rows, and
-- drops that were left to another writer's row.
CREATE INDEX drop_event_judged_lid ON wa_monitor.drop_event (phone) WHERE stored_as = 'lid';
CREATE INDEX drop_event_foreign ON wa_monitor.drop_event (source) WHERE kind = 'foreign';
