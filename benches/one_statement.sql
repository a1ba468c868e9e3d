-- (b) The whole charge in one statement, which is a transaction by itself; for
-- pgbench. See textbook.sql for the variables.
\set a random(1000000000000000, 9999999999999999)
\set b random(1000000000000000, 9999999999999999)
with claimed as (
    insert into idempotency_keys (
        account_id, key, request_hash, operation_id, request_id, response_status, response_body,
        created_at, expires_at
    )
    values (
        :account::uuid, :a::text || '-' || :b::text, :hash::bytea, (:a::text || :b::text)::uuid,
        (:b::text || :a::text)::uuid, 200, :body::json, now(), now() + interval '24 hours'
    )
    on conflict do nothing
    returning account_id, operation_id, request_id, key, request_hash
)
insert into charges (
    account_id, charge_id, idempotency_key, request_hash, request_id, amount, currency,
    customer, metadata, capture, status, created_at
)
select
    account_id, operation_id, key, request_hash, request_id,
    :amount::bigint, :currency::text, :customer::text, '{}'::jsonb, true, 'succeeded', now()
from claimed;
