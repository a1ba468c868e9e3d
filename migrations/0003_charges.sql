-- A charge happens once: it and its key are written in one transaction, and it
-- carries the key for as long as it exists, which is longer than the key's row.
create table charges (
    account_id uuid not null,
    charge_id uuid not null,
    -- Null: the request had no key, and was told from others by its content
    -- for a few seconds only.
    idempotency_key varchar(255) collate "C",
    request_hash bytea not null,
    -- Stands in the answer, which can be written again from this row, byte for
    -- byte, when it has expired.
    request_id uuid not null,
    amount bigint not null,
    currency text not null,
    customer text,
    source text,
    description text,
    metadata jsonb not null,
    -- What was asked for: take the money now, or authorise only.
    capture boolean not null,
    status text not null,
    failure_code text,
    decline_code text,
    failure_message text,
    created_at timestamptz not null,
    constraint charges_pkey primary key (account_id, charge_id),
    -- The second line of defence: it outlives the stored answer.
    constraint charges_idempotency_key_key unique (account_id, idempotency_key),
    constraint charges_request_hash_length check (octet_length(request_hash) = 33),
    constraint charges_amount_positive check (amount > 0),
    constraint charges_currency_form check (currency ~ '^[a-z]{3}$'),
    constraint charges_status_known check (status in ('pending', 'succeeded', 'failed')),
    constraint charges_failure_has_code check ((status = 'failed') = (failure_code is not null))
);
