-- (a) What a textbook implementation sends for a charge, for pgbench: claim the
-- key, write the charge, store the answer. What a driver would send as a
-- parameter is one here. Two random numbers make the key and, since decimal
-- digits are hexadecimal too, the ids.
\set a random(1000000000000000, 9999999999999999)
\set b random(1000000000000000, 9999999999999999)
begin;
insert into idempotency_keys (account_id, key, request_hash, operation_id, request_id, created_at, expires_at)
values (
    :account::uuid, :a::text || '-' || :b::text, :hash::bytea, (:a::text || :b::text)::uuid,
    (:b::text || :a::text)::uuid, now(), now() + interval '24 hours'
)
on conflict do nothing;
insert into charges (
    account_id, charge_id, idempotency_key, request_hash, request_id, amount, currency,
    customer, metadata, capture, status, created_at
)
values (
    :account::uuid, (:a::text || :b::text)::uuid, :a::text || '-' || :b::text, :hash::bytea,
    (:b::text || :a::text)::uuid, :amount::bigint, :currency::text, :customer::text,
    '{}'::jsonb, true, 'succeeded', now()
);
update idempotency_keys set response_status = 200, response_body = :body::json
where account_id = :account::uuid and key = :a::text || '-' || :b::text;
commit;
