-- What a key was used for, and the answer to it. The row is the lock while the
-- work is under way, and the memory afterwards.
--
-- No foreign keys to accounts: they were measured to cost more than a fifth
-- of the throughput, and only an authenticated account gets this far.
--
-- `payonce::layer` gives this file to services of others, so it stands alone.
create table idempotency_keys (
    account_id uuid not null,
    key varchar(255) collate "C" not null,
    -- One byte of version and a SHA-256 over what the request means.
    request_hash bytea not null,
    -- A digest per field of the request, to say which of them another one differs
    -- in; null where that is not known.
    field_digests bytea,
    -- What whoever claimed the key is doing: for a payment, its charge. A writer
    -- that lost the answer to its COMMIT finds its own work again by it.
    operation_id uuid not null,
    -- The exchange in which the key was claimed.
    request_id uuid not null,
    -- No status: the work is under way, and this row is its lock.
    response_status smallint,
    -- What else belongs to the answer: headers, and how the body is written
    -- down. Null where the answer is payonce's own, and always JSON.
    response_head json,
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
