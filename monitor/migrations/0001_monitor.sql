-- What the monitor keeps for itself. Nothing here is anybody else's, and the dashboard's table is not touched.

CREATE SCHEMA IF NOT EXISTS wa_monitor;

CREATE TABLE wa_monitor.migration (
    version     integer     PRIMARY KEY,
    applied_at  timestamptz NOT NULL DEFAULT now()
);

-- How far each bridge was read, who may write, and the exact totals of what was written. The row is the lock.
CREATE TABLE wa_monitor.cursor (
    source            text             PRIMARY KEY,
    epoch             bigint           NOT NULL,        -- fencing token: raised at each take-over
    owner_host        text             NOT NULL,
    owner_pid         integer          NOT NULL,
    owner_started     text             NOT NULL,        -- with the pid it names one process, also after the pid was used again
    owner_generation  text             NOT NULL,
    owner_tree        text             NOT NULL,
    released          boolean          NOT NULL,        -- the owner said that it has finished
    renewed_at        timestamptz      NOT NULL,
    lease_seconds     double precision NOT NULL,
    place_rowid       bigint           NOT NULL,
    place_key         text             NOT NULL,        -- key and chat of the message at that rowid; empty: nothing to compare
    place_chat_jid    text             NOT NULL,
    place_file        text             NOT NULL,        -- device:inode
    since             timestamptz,                      -- messages sent before this are not ours; NULL: all are
    totals            jsonb            NOT NULL DEFAULT '{}',
    created_at        timestamptz      NOT NULL DEFAULT now()
);

-- The ledger: every message that was dealt with, how, and by which code.
CREATE TABLE wa_monitor.message (
    source        text        NOT NULL,
    chat_jid      text        NOT NULL,
    message_key   text        NOT NULL,
    content_hash  text        NOT NULL,                 -- another hash under the same key is an edit
    outcome       text        NOT NULL,
    project       text,
    sent_at       timestamptz,
    tree          text        NOT NULL,                 -- digest of the source tree that decided (WA_TREE)
    generation    text        NOT NULL,
    decided_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, chat_jid, message_key)
);

-- One row for each drop of each message: who sent it, as it was understood then. Never overwritten; what the map
-- teaches later is added.
CREATE TABLE wa_monitor.drop_event (
    source        text        NOT NULL,
    chat_jid      text        NOT NULL,
    message_key   text        NOT NULL,
    drop_number   text        NOT NULL,
    project       text        NOT NULL,
    drop_space    text        NOT NULL,
    kind          text        NOT NULL,                 -- new | resubmission
    stored_as     text        NOT NULL,                 -- phone | pending | unknown | lid, judged from the row after the write
    sender        text        NOT NULL,                 -- as the bridge spells it
    lid           text,
    phone         text,
    reason        text        NOT NULL,
    review_id     text        NOT NULL,                 -- qa_photo_reviews.id
    tree          text        NOT NULL,
    generation    text        NOT NULL,
    sent_at       timestamptz NOT NULL,
    stored_at     timestamptz NOT NULL DEFAULT now(),
    resolved_at   timestamptz,                          -- when the map gave the phone of a sender that was pending
    resolved_tree text,
    PRIMARY KEY (source, chat_jid, message_key, drop_number)
);
CREATE INDEX drop_event_review ON wa_monitor.drop_event (review_id);

-- Drops whose sender is not known yet; looked at again at each change of the map.
CREATE TABLE wa_monitor.pending (
    source        text        NOT NULL,
    chat_jid      text        NOT NULL,
    message_key   text        NOT NULL,
    drop_number   text        NOT NULL,
    project       text        NOT NULL,
    sender        text        NOT NULL,
    lid           text,
    review_id     text        NOT NULL,
    since         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, chat_jid, message_key, drop_number)
);
CREATE INDEX pending_review ON wa_monitor.pending (review_id);

-- Every mapping that the bridge ever showed: its own map is a snapshot that forgets.
CREATE TABLE wa_monitor.lid_seen (
    lid            text        NOT NULL,
    phone          text        NOT NULL,
    first_seen_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (lid, phone)
);

-- Every row that a repair changed, with what stood there before.
CREATE TABLE wa_monitor.repair (
    run_id            text        NOT NULL,
    review_id         text        NOT NULL,
    drop_number       text        NOT NULL,
    project           text,
    old_submitted_by  text,
    new_submitted_by  text,
    old_user_name     text,
    new_user_name     text,
    repaired_at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, review_id)
);

-- Messages that can never be stored, and why. They do not hold up the others.
CREATE TABLE wa_monitor.dead_letter (
    source       text        NOT NULL,
    chat_jid     text        NOT NULL,
    message_key  text        NOT NULL,
    project      text,
    reason       text        NOT NULL,
    tree         text        NOT NULL,
    generation   text        NOT NULL,
    failed_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, chat_jid, message_key)
);
