-- Senders that were judged LIDs by their rows are looked up at each count; there should be none.
CREATE INDEX drop_event_judged_lid ON wa_monitor.drop_event (phone) WHERE stored_as = 'lid';
