-- Every statement of the monitor, each under its name. Names of tables are written in full and nothing depends on
-- the session (no SET, LISTEN, session lock, temporary table), so that a transaction pooler may stand in between.

-- name: migrated_version
-- The newest migration that was applied; the table must exist.
SELECT coalesce(max(version), 0) FROM wa_monitor.migration

-- name: table_exists
-- Asked of the catalogue's tables and not of to_regclass(), whose cached "no" outlives the wait for a lock.
SELECT EXISTS (SELECT FROM pg_catalog.pg_class AS class
               JOIN pg_catalog.pg_namespace AS namespace ON namespace.oid = class.relnamespace
               WHERE namespace.nspname = %(schema)s AND class.relname = %(table)s)

-- name: lock_migrations
-- Two monitors that start at once must not create the same tables; the lock ends with the transaction.
SELECT pg_advisory_xact_lock(7205759403792793)

-- name: record_migration
INSERT INTO wa_monitor.migration (version) VALUES (%(version)s)

-- name: review_columns
-- What the dashboard's table looks like here.
SELECT column_name::text, data_type::text, character_maximum_length,
       is_nullable = 'NO' AND column_default IS NULL AND is_identity = 'NO' AND is_generated = 'NEVER' AS demanded
FROM information_schema.columns
WHERE table_schema = 'public' AND table_name = 'qa_photo_reviews'

-- name: look
-- Who owns the cursor and where it stands, without locking anything. Whether the lease has run out is the database's
-- judgement, since hosts' clocks differ.
SELECT epoch, owner_host, owner_pid, owner_started, released,
       renewed_at + make_interval(secs => lease_seconds) < clock_timestamp() AS expired,
       renewed_at, place_rowid, place_key, place_chat_jid, place_file, since, since_rowid, totals, created_at
FROM wa_monitor.cursor
WHERE source = %(source)s

-- name: begin
-- The first start ever for this source. Of two first starts one wins.
INSERT INTO wa_monitor.cursor (source, epoch, owner_host, owner_pid, owner_started, owner_generation, owner_tree,
                               released, renewed_at, lease_seconds,
                               place_rowid, place_key, place_chat_jid, place_file, since, since_rowid)
VALUES (%(source)s, 0, %(host)s, %(pid)s, %(started)s, %(generation)s, %(tree)s, true, clock_timestamp(), %(lease)s,
        %(rowid)s, %(key)s, %(chat_jid)s, %(file)s, %(since)s, %(since_rowid)s)
ON CONFLICT (source) DO NOTHING

-- name: adopt_rows
-- What stands in the table and nobody of ours explains is taken as it is, in one step that is recorded.
WITH adopted AS (
    INSERT INTO wa_monitor.adopted_row (review_id)
    SELECT id::text FROM public.qa_photo_reviews AS review
    WHERE NOT EXISTS (SELECT FROM wa_monitor.drop_event AS event
                      WHERE event.review_id = review.id::text AND event.kind <> 'foreign')
    ON CONFLICT DO NOTHING
    RETURNING 1)
INSERT INTO wa_monitor.adoption (source, rows_total, positions)
SELECT %(source)s, (SELECT count(*) FROM adopted), %(positions)s
RETURNING rows_total

-- name: other_sources
SELECT count(*) FROM wa_monitor.cursor WHERE source <> %(source)s

-- name: adopted_positions
-- Until when the old monitor had dealt with each chat, if its state was taken over.
SELECT positions FROM wa_monitor.adoption WHERE source = %(source)s AND positions <> '{}' ORDER BY id DESC LIMIT 1

-- name: name_installation
INSERT INTO wa_monitor.installation (identity) VALUES (%(identity)s) ON CONFLICT DO NOTHING

-- name: installation
SELECT identity FROM wa_monitor.installation

-- name: server_time
SELECT clock_timestamp()

-- name: limit_lock_wait
-- For the current transaction only: a frozen owner must not freeze the one that wants to take over.
SELECT set_config('lock_timeout', '1s', true)

-- name: limit_waits
-- For the current transaction only: what somebody else has locked is an error that is shown and tried again, within the
-- silence that a supervisor allows (15 s), and not a monitor that hangs.
SELECT set_config('lock_timeout', '3s', true), set_config('statement_timeout', '10s', true)

-- name: check_constraints_now
-- For the current transaction only: constraints that would be checked at the commit.
SET CONSTRAINTS ALL IMMEDIATE

-- name: claim
-- Take over from the owner that was seen. Any sign of life in between (a renewal, another take-over) makes this a no-op.
UPDATE wa_monitor.cursor
SET epoch = epoch + 1, owner_host = %(host)s, owner_pid = %(pid)s, owner_started = %(started)s,
    owner_generation = %(generation)s, owner_tree = %(tree)s, released = false,
    renewed_at = clock_timestamp(), lease_seconds = %(lease)s
WHERE source = %(source)s AND epoch = %(epoch)s AND renewed_at = %(renewed_at)s
RETURNING epoch

-- name: renew
UPDATE wa_monitor.cursor SET renewed_at = clock_timestamp() WHERE source = %(source)s AND epoch = %(epoch)s

-- name: release
-- The owner has finished; the next one need not wait for anything.
UPDATE wa_monitor.cursor SET released = true WHERE source = %(source)s AND epoch = %(epoch)s

-- name: lock
-- The first statement of every write: holds the cursor row until the commit. No row: somebody else has the epoch.
-- A client that stops in mid-transaction is disconnected by the server after the lease, so that the row is free again.
SELECT place_rowid, totals,
       set_config('idle_in_transaction_session_timeout', %(idle_timeout)s, true)
FROM wa_monitor.cursor
WHERE source = %(source)s AND epoch = %(epoch)s
FOR UPDATE

-- name: move
-- The last statement of every write: the new place and the new totals, in the transaction of what they count.
UPDATE wa_monitor.cursor
SET place_rowid = %(rowid)s, place_key = %(key)s, place_chat_jid = %(chat_jid)s, place_file = %(file)s,
    totals = %(totals)s, renewed_at = clock_timestamp()
WHERE source = %(source)s AND epoch = %(epoch)s

-- name: set_since_rowid
-- The file was replaced, rows have other numbers: what it holds now counts as having been there before.
UPDATE wa_monitor.cursor SET since_rowid = %(since_rowid)s
WHERE source = %(source)s AND epoch = %(epoch)s AND since_rowid IS NOT NULL

-- name: set_totals
UPDATE wa_monitor.cursor SET totals = %(totals)s, renewed_at = clock_timestamp()
WHERE source = %(source)s AND epoch = %(epoch)s

-- name: known_messages
-- What the ledger says of these messages. One look-up by primary key for each: a join reads the whole ledger as soon
-- as the planner thinks so, and it only ever grows. (OFFSET 0 keeps the look-up from being turned into that join.)
SELECT asked.chat_jid, asked.message_key, found.content_hash, found.outcome
FROM unnest(%(chat_jids)s::text[], %(keys)s::text[]) AS asked (chat_jid, message_key)
CROSS JOIN LATERAL (SELECT content_hash, outcome FROM wa_monitor.message AS message
                    WHERE message.source = %(source)s AND message.chat_jid = asked.chat_jid
                      AND message.message_key = asked.message_key
                    OFFSET 0) AS found

-- name: known_events
-- Which drops of these messages are stored already (an edited message is only good for its new ones).
SELECT asked.chat_jid, asked.message_key, found.drop_number
FROM unnest(%(chat_jids)s::text[], %(keys)s::text[]) AS asked (chat_jid, message_key)
CROSS JOIN LATERAL (SELECT drop_number FROM wa_monitor.drop_event AS event
                    WHERE event.source = %(source)s AND event.chat_jid = asked.chat_jid
                      AND event.message_key = asked.message_key
                    OFFSET 0) AS found

-- name: standing_drops
-- The rows of these drops in whatever project, the newest of each first, and whether we know how they came to be there:
-- by an event of ours, or because they stood there before us.
SELECT asked.number, found.project, found.review_id, found.sent_at, found.submitted_by, found.user_name,
       EXISTS (SELECT FROM wa_monitor.drop_event AS event
               WHERE event.review_id = found.review_id AND event.kind <> 'foreign') AS explained,
       EXISTS (SELECT FROM wa_monitor.adopted_row AS adopted WHERE adopted.review_id = found.review_id) AS adopted
FROM unnest(%(numbers)s::text[]) AS asked (number)
CROSS JOIN LATERAL (SELECT project::text, id::text AS review_id, whatsapp_message_date AS sent_at,
                           submitted_by::text, user_name::text
                    FROM public.qa_photo_reviews AS review
                    WHERE review.drop_number = asked.number
                    ORDER BY review_date DESC NULLS LAST, created_at DESC
                    OFFSET 0) AS found

-- name: insert_reviews
-- New drops. What the row holds after the write comes back and is judged.
INSERT INTO public.qa_photo_reviews
    (drop_number, user_name, submitted_by, project, whatsapp_message_date, review_date, comment)
SELECT * FROM unnest(%(numbers)s::text[], %(user_names)s::text[], %(submitted_bys)s::text[], %(projects)s::text[],
                     %(sent_ats)s::timestamptz[], %(days)s::date[], %(comments)s::text[])
RETURNING drop_number::text, project::text, id::text, submitted_by::text, user_name::text

-- name: resubmit_review
-- The same drop again: the review starts over, its steps stay, and so does the day it counts for. The sender changes
-- only if the new one has a phone; but the LID of a new one that has none does not stay, where an old system left it. Of
-- several rows (one a day, as the unique key allows) the newest is meant.
UPDATE public.qa_photo_reviews
SET incomplete = false, feedback_sent = NULL, resubmitted = true, updated_at = now(),
    comment = concat_ws(E'\n', nullif(comment, ''), %(note)s::text),
    submitted_by = CASE WHEN btrim(substring(submitted_by FROM '^\s*[+]?([^@:.]*)')) = %(lid)s::text THEN %(submitted_by)s::text
                   ELSE coalesce(%(submitted_by)s::text, submitted_by) END,
    user_name = CASE WHEN %(submitted_by)s::text IS NOT NULL
                       OR btrim(substring(user_name FROM '^\s*[+]?([^@:.]*)')) = %(lid)s::text THEN %(user_name)s::text
                ELSE user_name END
WHERE id = (SELECT id FROM public.qa_photo_reviews
            WHERE drop_number = %(number)s AND project = ANY (%(projects)s)
            ORDER BY review_date DESC NULLS LAST, created_at DESC LIMIT 1)
RETURNING drop_number::text, project::text, id::text, submitted_by::text, user_name::text

-- name: insert_events
INSERT INTO wa_monitor.drop_event
    (source, chat_jid, message_key, drop_number, project, drop_space, kind, stored_as, sender, lid, phone, reason,
     review_id, sent_at, confidence, tree, generation)
SELECT %(source)s, event.*, %(tree)s, %(generation)s
FROM unnest(%(chat_jids)s::text[], %(keys)s::text[], %(numbers)s::text[], %(projects)s::text[], %(spaces)s::text[],
            %(kinds)s::text[], %(stored_as)s::text[], %(senders)s::text[], %(lids)s::text[], %(phones)s::text[],
            %(reasons)s::text[], %(review_ids)s::text[], %(sent_ats)s::timestamptz[], %(confidences)s::text[]) AS event

-- name: insert_pending
INSERT INTO wa_monitor.pending (source, chat_jid, message_key, drop_number, project, sender, lid, review_id, standing)
SELECT %(source)s, waiting.*
FROM unnest(%(chat_jids)s::text[], %(keys)s::text[], %(numbers)s::text[], %(projects)s::text[], %(senders)s::text[],
            %(lids)s::text[], %(review_ids)s::text[], %(standings)s::text[]) AS waiting

-- name: drop_pending_of_reviews
-- Somebody with a phone took these rows over; nobody waits for them any more.
DELETE FROM wa_monitor.pending WHERE review_id = ANY (%(review_ids)s)

-- name: insert_messages
-- The ledger: messages that it does not know. Nobody else writes for this source as long as its cursor row is locked.
INSERT INTO wa_monitor.message
    (source, chat_jid, message_key, content_hash, outcome, project, sent_at, tree, generation)
SELECT %(source)s, done.*, %(tree)s, %(generation)s
FROM unnest(%(chat_jids)s::text[], %(keys)s::text[], %(hashes)s::text[], %(outcomes)s::text[], %(projects)s::text[],
            %(sent_ats)s::timestamptz[]) AS done

-- name: record_messages
-- The ledger: an edit, or a message that could be stored after all, replaces what was known.
INSERT INTO wa_monitor.message
    (source, chat_jid, message_key, content_hash, outcome, project, sent_at, tree, generation)
SELECT %(source)s, done.*, %(tree)s, %(generation)s
FROM unnest(%(chat_jids)s::text[], %(keys)s::text[], %(hashes)s::text[], %(outcomes)s::text[], %(projects)s::text[],
            %(sent_ats)s::timestamptz[]) AS done
ON CONFLICT (source, chat_jid, message_key) DO UPDATE
SET content_hash = excluded.content_hash, outcome = excluded.outcome, project = excluded.project,
    sent_at = excluded.sent_at, tree = excluded.tree, generation = excluded.generation, decided_at = now()

-- name: record_dead_letters
INSERT INTO wa_monitor.dead_letter (source, chat_jid, message_key, project, reason, tree, generation)
SELECT %(source)s, dead.*, %(tree)s, %(generation)s
FROM unnest(%(chat_jids)s::text[], %(keys)s::text[], %(projects)s::text[], %(reasons)s::text[]) AS dead
ON CONFLICT (source, chat_jid, message_key) DO UPDATE
SET reason = excluded.reason, tree = excluded.tree, generation = excluded.generation, failed_at = now()

-- name: dead_letters
-- Which messages were refused, oldest first.
SELECT chat_jid, message_key FROM wa_monitor.dead_letter WHERE source = %(source)s ORDER BY failed_at, message_key

-- name: reopen_foreign
-- Messages whose drop was left to another writer's row, and that row is gone: nobody has stored them, and they become dead
-- letters, which are tried again.
WITH gone AS (
    DELETE FROM wa_monitor.drop_event AS event
    WHERE source = %(source)s AND kind = 'foreign'
      AND NOT EXISTS (SELECT FROM public.qa_photo_reviews AS review
                      WHERE review.drop_number = event.drop_number AND review.id::text = event.review_id)
    RETURNING chat_jid, message_key, project),
messages AS (SELECT DISTINCT chat_jid, message_key, project FROM gone),
letters AS (
    INSERT INTO wa_monitor.dead_letter (source, chat_jid, message_key, project, reason, tree, generation)
    SELECT %(source)s, messages.*, 'the row of another writer, to which it was left, is gone', %(tree)s, %(generation)s
    FROM messages
    ON CONFLICT DO NOTHING)
UPDATE wa_monitor.message AS message
SET outcome = 'dead_letter'
FROM messages
WHERE message.source = %(source)s AND message.chat_jid = messages.chat_jid
  AND message.message_key = messages.message_key

-- name: forget_dead_letters
-- They could be stored, or need not be, after all.
DELETE FROM wa_monitor.dead_letter AS letter
USING unnest(%(chat_jids)s::text[], %(keys)s::text[]) AS settled (chat_jid, message_key)
WHERE letter.source = %(source)s AND letter.chat_jid = settled.chat_jid AND letter.message_key = settled.message_key

-- name: remember_mappings
INSERT INTO wa_monitor.lid_seen (lid, phone)
SELECT * FROM unnest(%(lids)s::text[], %(phones)s::text[])
ON CONFLICT DO NOTHING

-- name: pending
-- Everything that waits for the map, oldest first, so that of two senders of one row the last to have posted wins.
SELECT chat_jid, message_key, drop_number, pending.project, pending.sender, pending.review_id,
       coalesce(event.kind, 'new')
FROM wa_monitor.pending
LEFT JOIN wa_monitor.drop_event AS event USING (source, chat_jid, message_key, drop_number)
WHERE source = %(source)s
ORDER BY pending.position

-- name: complete_review
-- The map knows the sender now. Guarded: a row that shows another sender than when this one posted keeps it, unless it is
-- this sender's own LID, which a faulty version put there. Nothing else is touched, not even updated_at, because nobody
-- resubmitted anything.
UPDATE public.qa_photo_reviews AS review
SET submitted_by = %(phone)s,
    user_name = CASE WHEN user_name = ANY (%(placeholders)s) OR user_name IN (%(unresolved)s, waiting.standing)
                THEN %(phone)s ELSE user_name END
FROM wa_monitor.pending AS waiting
WHERE waiting.source = %(source)s AND waiting.chat_jid = %(chat_jid)s AND waiting.message_key = %(key)s
  AND waiting.drop_number = %(number)s
  AND review.drop_number = %(number)s AND review.id::text = waiting.review_id
  AND (submitted_by IS NULL OR submitted_by IN (%(unresolved)s, waiting.standing))
  AND submitted_by IS DISTINCT FROM %(phone)s
RETURNING submitted_by::text, user_name::text

-- name: move_standing
-- Whoever posted later for the same row, and waits, finds this sender in it instead.
UPDATE wa_monitor.pending AS later
SET standing = %(phone)s
FROM wa_monitor.pending AS done
WHERE done.source = %(source)s AND done.chat_jid = %(chat_jid)s AND done.message_key = %(key)s
  AND done.drop_number = %(number)s AND later.review_id = done.review_id AND later.position > done.position

-- name: complete_event
-- Which code filled in the sender, and when; the phone only if it is one.
UPDATE wa_monitor.drop_event
SET phone = coalesce(phone, %(known_phone)s), resolved_at = now(), resolved_tree = %(tree)s
WHERE source = %(source)s AND chat_jid = %(chat_jid)s AND message_key = %(key)s AND drop_number = %(number)s

-- name: delete_pending
DELETE FROM wa_monitor.pending
WHERE source = %(source)s AND chat_jid = %(chat_jid)s AND message_key = %(key)s AND drop_number = %(number)s

-- name: mappings
-- Every mapping that the bridge ever showed.
SELECT lid, phone FROM wa_monitor.lid_seen

-- name: mappings_seen
-- Every LID that the bridge ever showed, and its phone if there was never another.
SELECT lid, CASE WHEN count(*) = 1 THEN min(phone) END FROM wa_monitor.lid_seen GROUP BY lid

-- name: unlisted_lids
-- LIDs that the map never showed: what we stored as a sender and judged a LID by the row, and whose drops wait.
SELECT phone FROM wa_monitor.drop_event AS event
WHERE stored_as = 'lid' AND phone IS NOT NULL
  AND NOT EXISTS (SELECT FROM wa_monitor.lid_seen AS seen WHERE seen.phone = event.phone)
UNION
SELECT lid FROM wa_monitor.pending WHERE lid IS NOT NULL

-- name: count_lid_rows
-- How many rows hold a LID now, by project: either column, in any spelling. Here and below a value is cut to its user
-- part as `judgement.user_part` does it: blanks, + and what follows the digits (.agent, :device, @server) are left out.
SELECT coalesce(project, '')::text, count(*)
FROM public.qa_photo_reviews
WHERE btrim(substring(submitted_by FROM '^\s*[+]?([^@:.]*)')) IN (SELECT unnest(%(lids)s::text[]))
   OR btrim(substring(user_name FROM '^\s*[+]?([^@:.]*)')) IN (SELECT unnest(%(lids)s::text[]))
   OR submitted_by ~* '@(hosted[.])?lid\s*$' OR user_name ~* '@(hosted[.])?lid\s*$'
GROUP BY 1

-- name: count_foreign_rows
-- Rows that no event of ours explains and that did not stand there before us: another writer's, by project.
SELECT coalesce(project, '')::text, count(*)
FROM public.qa_photo_reviews AS review
WHERE NOT EXISTS (SELECT FROM wa_monitor.adopted_row AS adopted WHERE adopted.review_id = review.id::text)
  AND NOT EXISTS (SELECT FROM wa_monitor.drop_event AS event
                  WHERE event.review_id = review.id::text AND event.kind <> 'foreign')
GROUP BY 1

-- name: count_pending
SELECT count(*) FROM wa_monitor.pending WHERE source = %(source)s

-- name: usual_messages
-- How many messages this hour of the week had on average in the last four weeks: what the age of the newest message has
-- to be judged against.
SELECT count(*) / 4.0
FROM wa_monitor.message
WHERE source = %(source)s AND sent_at BETWEEN %(now)s::timestamptz - interval '28 days' AND %(now)s::timestamptz
  AND mod(extract(epoch FROM date_trunc('hour', %(now)s::timestamptz) - date_trunc('hour', sent_at)), 604800) = 0
  AND sent_at < date_trunc('hour', %(now)s::timestamptz)

-- name: count_repaired
SELECT count(*) FROM wa_monitor.repair

-- name: lid_rows
-- The rows that hold a LID which the map can resolve, of messages sent since then; if asked for, also those that hold the
-- full address of a phone.
SELECT id::text, drop_number::text, coalesce(project, '')::text, submitted_by::text, user_name::text
FROM public.qa_photo_reviews AS review
WHERE (btrim(substring(submitted_by FROM '^\s*[+]?([^@:.]*)')) IN (SELECT unnest(%(lids)s::text[]))
       OR btrim(substring(user_name FROM '^\s*[+]?([^@:.]*)')) IN (SELECT unnest(%(lids)s::text[]))
       OR %(addresses)s::boolean AND (submitted_by ~* '@(s[.]whatsapp[.]net|c[.]us|hosted)\s*$'
                                      OR user_name ~* '@(s[.]whatsapp[.]net|c[.]us|hosted)\s*$'))
  AND (%(since)s::timestamptz IS NULL OR coalesce(whatsapp_message_date, created_at) >= %(since)s::timestamptz)

-- name: rows_put_back
-- What operators have put back, as they put it.
SELECT review_id, old_submitted_by, old_user_name FROM wa_monitor.repair WHERE undone_at IS NOT NULL

-- name: lock_rows
-- These rows as they are now, locked until the batch is committed; those that are gone are missing. Looked up one by one,
-- as a join reads the whole table for each batch.
SELECT found.*
FROM unnest(%(review_ids)s::text[], %(numbers)s::text[]) AS asked (review_id, drop_number)
CROSS JOIN LATERAL (SELECT id::text, review.drop_number::text, coalesce(project, '')::text, submitted_by::text,
                           user_name::text, review.ctid::text
                    FROM public.qa_photo_reviews AS review
                    WHERE review.drop_number = asked.drop_number AND review.id::text = asked.review_id
                    OFFSET 0
                    FOR UPDATE) AS found

-- name: repair_reviews
-- Two columns of rows that the batch holds locked, nothing else. As long as they are locked they stay where they are.
UPDATE public.qa_photo_reviews AS review
SET submitted_by = fixed.submitted_by, user_name = fixed.user_name
FROM unnest(%(places)s::tid[], %(review_ids)s::text[], %(new_submitted_bys)s::text[], %(new_user_names)s::text[])
     AS fixed (place, review_id, submitted_by, user_name)
WHERE review.ctid = fixed.place AND review.id::text = fixed.review_id

-- name: record_repairs
INSERT INTO wa_monitor.repair (run_id, review_id, drop_number, project, old_submitted_by, new_submitted_by,
                               old_user_name, new_user_name)
SELECT %(run_id)s, fixed.*
FROM unnest(%(review_ids)s::text[], %(numbers)s::text[], %(projects)s::text[], %(old_submitted_bys)s::text[],
            %(new_submitted_bys)s::text[], %(old_user_names)s::text[], %(new_user_names)s::text[]) AS fixed

-- name: undo_repairs
-- What a run changed and nobody has written since gets its old values back. The same phone may have been written again: by
-- a message of its owner, or by a later run after somebody else's change.
WITH restored AS (
    UPDATE public.qa_photo_reviews AS review
    SET submitted_by = repair.old_submitted_by, user_name = repair.old_user_name
    FROM wa_monitor.repair AS repair
    WHERE repair.run_id = %(run_id)s AND repair.undone_at IS NULL
      AND review.drop_number = repair.drop_number AND review.id::text = repair.review_id
      AND review.submitted_by IS NOT DISTINCT FROM repair.new_submitted_by
      AND review.user_name IS NOT DISTINCT FROM repair.new_user_name
      AND NOT EXISTS (SELECT FROM wa_monitor.drop_event AS event
                      WHERE event.review_id = repair.review_id AND event.kind IN ('new', 'resubmission')
                        AND event.phone IS NOT NULL
                        AND coalesce(event.resolved_at, event.stored_at) > repair.repaired_at)
      AND NOT EXISTS (SELECT FROM wa_monitor.repair AS later
                      WHERE later.review_id = repair.review_id AND later.undone_at IS NULL
                        AND later.repaired_at > repair.repaired_at)
    RETURNING repair.review_id)
UPDATE wa_monitor.repair AS repair
SET undone_at = now()
FROM restored
WHERE repair.run_id = %(run_id)s AND repair.review_id = restored.review_id
RETURNING coalesce(repair.project, '')

-- name: repairs_not_undone
SELECT drop_number, coalesce(project, '') FROM wa_monitor.repair
WHERE run_id = %(run_id)s AND undone_at IS NULL
ORDER BY 2, 1

-- name: repairs_of_run
SELECT count(*) FROM wa_monitor.repair WHERE run_id = %(run_id)s

-- name: repair_runs
-- The newest runs first.
SELECT DISTINCT run_id FROM wa_monitor.repair ORDER BY 1 DESC LIMIT 5

-- name: doubtful_rows
-- Senders that may be a LID which the map does not have: an address at a LID server, or very many digits.
SELECT DISTINCT drop_number::text, coalesce(project, '')::text, shown.sender::text
FROM public.qa_photo_reviews, LATERAL (VALUES (submitted_by), (user_name)) AS shown (sender)
WHERE shown.sender ~* '@(hosted[.])?lid\s*$' OR shown.sender ~ '^\s*[+]?[0-9]{13,20}\s*$'
ORDER BY 2, 1, 3

-- name: audit_standing
-- The LIDs that stand in the table now, with the code that stored each (none for a row that no message of ours
-- explains), by project and code.
SELECT coalesce(review.project, '')::text, event.tree, min(event.stored_at), count(*)
FROM public.qa_photo_reviews AS review
LEFT JOIN LATERAL (SELECT coalesce(resolved_tree, tree) AS tree, coalesce(resolved_at, stored_at) AS stored_at
                   FROM wa_monitor.drop_event
                   WHERE review_id = review.id::text
                   ORDER BY 2 DESC LIMIT 1) AS event ON true
WHERE btrim(substring(review.submitted_by FROM '^\s*[+]?([^@:.]*)')) IN (SELECT unnest(%(lids)s::text[]))
   OR btrim(substring(review.user_name FROM '^\s*[+]?([^@:.]*)')) IN (SELECT unnest(%(lids)s::text[]))
   OR review.submitted_by ~* '@(hosted[.])?lid\s*$' OR review.user_name ~* '@(hosted[.])?lid\s*$'
GROUP BY 1, 2
ORDER BY 1, 2

-- name: audit_newly_stored
-- Drops that were judged to hold a LID at the moment they were stored, by project and code.
SELECT project, tree, min(stored_at), max(stored_at), count(*)
FROM wa_monitor.drop_event
WHERE stored_as = 'lid' AND kind IN ('new', 'resubmission')
GROUP BY 1, 2
ORDER BY 1, 2

-- name: audit_pending
SELECT project, lid IS NOT NULL, count(*), min(since) FROM wa_monitor.pending GROUP BY 1, 2 ORDER BY 1, 2

-- name: audit_dead_letters
SELECT coalesce(project, ''), reason, count(*), max(failed_at) FROM wa_monitor.dead_letter GROUP BY 1, 2 ORDER BY 1, 2

-- name: audit_foreign
-- Rows that no event of ours explains and that did not stand there before us, by project; in how many of them a message
-- of the bridge names the drop too.
SELECT coalesce(project, '')::text, count(*), min(created_at), max(created_at),
       count(*) FILTER (WHERE EXISTS (SELECT FROM wa_monitor.drop_event AS event WHERE event.review_id = review.id::text))
FROM public.qa_photo_reviews AS review
WHERE NOT EXISTS (SELECT FROM wa_monitor.adopted_row AS adopted WHERE adopted.review_id = review.id::text)
  AND NOT EXISTS (SELECT FROM wa_monitor.drop_event AS event
                  WHERE event.review_id = review.id::text AND event.kind <> 'foreign')
GROUP BY 1
ORDER BY 1

-- name: audit_drops
-- What was stored since then, and what its sender was: judged from the row, unless the row shows somebody else meanwhile.
SELECT drop_number, project, kind,
       CASE WHEN stored_as = 'phone' AND (phone IS NULL OR resolved_at IS NOT NULL)
            THEN CASE WHEN lid IS NULL THEN 'unknown' ELSE 'pending' END ELSE stored_as END,
       confidence, reason, stored_at, resolved_at
FROM wa_monitor.drop_event
WHERE stored_at >= %(since)s AND kind IN ('new', 'resubmission')
ORDER BY stored_at, drop_number

-- name: ledger_entries
-- What became of these messages, and why those were refused that were.
SELECT asked.chat_jid, asked.message_key, found.outcome, found.decided_at, found.reason
FROM unnest(%(chat_jids)s::text[], %(keys)s::text[]) AS asked (chat_jid, message_key)
CROSS JOIN LATERAL (SELECT message.outcome, message.decided_at, letter.reason
                    FROM wa_monitor.message AS message
                    LEFT JOIN wa_monitor.dead_letter AS letter USING (source, chat_jid, message_key)
                    WHERE message.source = %(source)s AND message.chat_jid = asked.chat_jid
                      AND message.message_key = asked.message_key
                    OFFSET 0) AS found

-- name: explain_events
-- Every message that named this drop, as it was dealt with, and what its sender was, as above.
SELECT chat_jid, message_key, kind, project, sent_at, stored_at, reason,
       CASE WHEN stored_as = 'phone' AND (phone IS NULL OR resolved_at IS NOT NULL)
            THEN CASE WHEN lid IS NULL THEN 'unknown' ELSE 'pending' END ELSE stored_as END,
       resolved_at
FROM wa_monitor.drop_event
WHERE drop_number = %(number)s
ORDER BY stored_at

-- name: explain_rows
-- The rows of this drop, and who put them there.
SELECT coalesce(project, '')::text, whatsapp_message_date, created_at, submitted_by::text, resubmitted,
       CASE WHEN EXISTS (SELECT FROM wa_monitor.drop_event AS event
                         WHERE event.review_id = review.id::text AND event.kind IN ('new', 'resubmission'))
            THEN 'monitor'
            WHEN EXISTS (SELECT FROM wa_monitor.adopted_row AS adopted WHERE adopted.review_id = review.id::text)
            THEN 'adopted' ELSE 'foreign' END
FROM public.qa_photo_reviews AS review
WHERE drop_number = %(number)s
ORDER BY created_at

-- name: reconcile_gone
-- Drops that were stored and whose row is not there any more.
SELECT drop_number, project, sent_at, 'stored as ' || kind
FROM wa_monitor.drop_event AS event
WHERE source = %(source)s AND (%(since)s::timestamptz IS NULL OR sent_at >= %(since)s::timestamptz)
  AND NOT EXISTS (SELECT FROM public.qa_photo_reviews AS review
                  WHERE review.drop_number = event.drop_number AND review.id::text = event.review_id)
ORDER BY sent_at, drop_number

-- name: reconcile_foreign
-- Rows that another writer put there.
SELECT drop_number::text, coalesce(project, '')::text, created_at, 'another writer'
FROM public.qa_photo_reviews AS review
WHERE (%(since)s::timestamptz IS NULL OR coalesce(whatsapp_message_date, created_at) >= %(since)s::timestamptz)
  AND NOT EXISTS (SELECT FROM wa_monitor.adopted_row AS adopted WHERE adopted.review_id = review.id::text)
  AND NOT EXISTS (SELECT FROM wa_monitor.drop_event AS event
                  WHERE event.review_id = review.id::text AND event.kind <> 'foreign')
ORDER BY created_at, drop_number
