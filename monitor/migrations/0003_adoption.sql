-- Rows that stood in the table before the monitor wrote to it. A row that is neither here nor explained by an event of
-- ours was put there by another writer.
CREATE TABLE wa_monitor.adopted_row (
    review_id   text        PRIMARY KEY,
    adopted_at  timestamptz NOT NULL DEFAULT now()
);

-- Each step in which rows were adopted: a first start, or an operator's word.
CREATE TABLE wa_monitor.adoption (
    id          bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    source      text        NOT NULL,
    adopted_at  timestamptz NOT NULL DEFAULT now(),
    rows_total  bigint      NOT NULL,
    positions   jsonb       NOT NULL DEFAULT '{}'       -- chat -> until when the old monitor had dealt with it
);

-- What this database calls itself, so that settings which name another one are refused.
CREATE TABLE wa_monitor.installation (
    only_one    boolean     PRIMARY KEY DEFAULT true CHECK (only_one),
    identity    text        NOT NULL
);

ALTER TABLE wa_monitor.drop_event ADD COLUMN confidence text;            -- certain | probable; NULL: unknown sender
CREATE INDEX drop_event_drop ON wa_monitor.drop_event (drop_number);
ALTER TABLE wa_monitor.repair ADD COLUMN undone_at timestamptz;          -- when its old values were put back

-- A database on which an earlier version has begun already.
DO $$
BEGIN
    IF EXISTS (SELECT FROM wa_monitor.cursor) THEN
        INSERT INTO wa_monitor.adopted_row (review_id) SELECT id::text FROM public.qa_photo_reviews;
    END IF;
END
$$;
