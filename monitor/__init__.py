"""Monitor: turns WhatsApp bridge messages into rows of PostgreSQL, with the phone number of the sender."""
