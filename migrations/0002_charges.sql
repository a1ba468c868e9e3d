-- A charge happens once: its key, with the answer, and the charge itself are
-- written in one transaction.
--
-- No foreign keys to accounts: they were measured to cost more than a fifth
-- of the throughput, and only an authenticated account gets this far.
create table idempotency_keys (
    account_id uuid not null,
    key varchar(255) collate "C" not null,
    -- One byte of version and a SHA-256 over what the request means.
    request_hash bytea not null,
    -- The charge of whoever claimed the key. A writer that lost the answer to
    -- its COMMIT finds its own work again by it.
    charge_id uuid not null,
    -- No status: the work is under way, and this row is its lock.
    response_status smallint,
    -- json, not jsonb: a replay owes the client the bytes of the first answer.
    response_body json,
    created_at timestamptz not null,
    expires_at timestamptz not null,
    constraint idempotency_keys_pkey primary key (account_id, key),
    constraint idempotency_keys_request_hash_length check (octet_length(request_hash) = 33),
    constraint idempotency_keys_answer_is_whole
        check ((response_status is null) = (response_body is null))
);

-- What the purge walks along.
create index idempotency_keys_expires_at_idx on idempotency_keys (expires_at);

create table charges (
    account_id uuid not null,
    charge_id uuid not null,
    idempotency_key varchar(255) collate "C" not null,
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
