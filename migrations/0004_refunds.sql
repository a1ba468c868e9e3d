-- Captures and refunds. Both change a charge that is there, and never take back
-- what they did: what was captured and what was refunded only grow, and the
-- constraints hold what no command may do, whatever runs beside it.
alter table charges
    -- What was taken of what was authorised; 0 until the capture.
    add column amount_captured bigint not null default 0,
    add column amount_refunded bigint not null default 0;

update charges set amount_captured = amount where capture and status = 'succeeded';

alter table charges
    add constraint charges_captured_within_amount
        check (amount_captured between 0 and amount),
    -- Nothing captured: it is cancelled as a whole, or not at all.
    add constraint charges_refunded_within_captured check (
        amount_refunded between 0 and case when amount_captured = 0 then amount else amount_captured end
    ),
    add constraint charges_captured_when_succeeded
        check ((amount_captured = 0 and amount_refunded = 0) or status = 'succeeded');

-- A customer's charges, newest first.
create index charges_customer_idx on charges (account_id, customer, charge_id)
    where customer is not null;

create table refunds (
    account_id uuid not null,
    refund_id uuid not null,
    charge_id uuid not null,
    -- Null: the request had no key.
    idempotency_key varchar(255) collate "C",
    request_hash bytea not null,
    request_id uuid not null,
    amount bigint not null,
    currency text not null,
    reason text,
    metadata jsonb not null,
    created_at timestamptz not null,
    constraint refunds_pkey primary key (account_id, refund_id),
    -- The second line of defence, as for charges.
    constraint refunds_idempotency_key_key unique (account_id, idempotency_key),
    constraint refunds_request_hash_length check (octet_length(request_hash) = 33),
    constraint refunds_amount_positive check (amount > 0),
    constraint refunds_reason_known
        check (reason in ('duplicate', 'fraudulent', 'requested_by_customer'))
);

-- A charge's refunds, newest first.
create index refunds_charge_id_idx on refunds (account_id, charge_id, refund_id);
