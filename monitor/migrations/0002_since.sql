-- `--since now` means what arrives from then on, whenever it was sent: the rows after this one. NULL: the time decides.
ALTER TABLE wa_monitor.cursor ADD COLUMN since_rowid bigint;
