-- The dashboard's table, for a database that has none: a demo, a test, a first look. Where it exists it is left alone;
-- the monitor never alters it and knows only the columns that `schema.py` lists.

CREATE TABLE public.qa_photo_reviews (
    id                                uuid         PRIMARY KEY DEFAULT gen_random_uuid(),
    drop_number                       varchar(50)  NOT NULL,
    review_date                       date         DEFAULT CURRENT_DATE,
    user_name                         varchar(100) NOT NULL,
    project                           varchar(100),
    whatsapp_message_date             timestamptz,
    submitted_by                      varchar(255),
    sender_phone                      varchar(50),
    comment                           text,
    completed                         boolean      NOT NULL DEFAULT false,
    incomplete                        boolean      NOT NULL DEFAULT false,
    resubmitted                       boolean      NOT NULL DEFAULT false,
    feedback_sent                     timestamptz,
    completed_photos                  integer      NOT NULL DEFAULT 0,
    outstanding_photos                integer      NOT NULL DEFAULT 12,
    outstanding_photos_loaded_to_1map boolean      NOT NULL DEFAULT false,
    assigned_agent                    varchar(50),
    step_01_house_photo               boolean      NOT NULL DEFAULT false,
    step_02_cable_from_pole           boolean      NOT NULL DEFAULT false,
    step_03_cable_entry_outside       boolean      NOT NULL DEFAULT false,
    step_04_cable_entry_inside        boolean      NOT NULL DEFAULT false,
    step_05_wall_for_installation     boolean      NOT NULL DEFAULT false,
    step_06_ont_back_after_install    boolean      NOT NULL DEFAULT false,
    step_07_power_meter_reading       boolean      NOT NULL DEFAULT false,
    step_08_ont_barcode               boolean      NOT NULL DEFAULT false,
    step_09_ups_serial                boolean      NOT NULL DEFAULT false,
    step_10_final_installation        boolean      NOT NULL DEFAULT false,
    step_11_green_lights              boolean      NOT NULL DEFAULT false,
    step_12_customer_signature        boolean      NOT NULL DEFAULT false,
    incorrect_steps                   text[]       DEFAULT '{}',
    incorrect_comments                jsonb        DEFAULT '{}',
    locked_by                         varchar(255),
    locked_at                         timestamptz,
    created_at                        timestamptz  NOT NULL DEFAULT now(),
    updated_at                        timestamptz  NOT NULL DEFAULT now(),
    CONSTRAINT qa_photo_reviews_drop_number_review_date_key UNIQUE (drop_number, review_date)
);
CREATE INDEX qa_photo_reviews_message_date ON public.qa_photo_reviews (whatsapp_message_date);
CREATE INDEX qa_photo_reviews_user_name ON public.qa_photo_reviews (user_name);
