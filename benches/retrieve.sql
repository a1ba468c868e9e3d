-- The same SELECT that reads a charge by its id, for pgbench.
\set n random(1, 100000)
select charge_id, request_id, amount, currency, customer, source, description, metadata, capture,
    amount_captured, amount_refunded, status, failure_code, decline_code, failure_message
from charges
where account_id = :account::uuid
    and charge_id = ('00000000000070008000' || lpad(:n::text, 12, '0'))::uuid;
