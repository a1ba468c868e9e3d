-- Who may charge: merchants and their API keys.
--
-- An API key is stored as its SHA-256 alone, so that a copy of this table
-- charges nobody. It can be revoked and replaced at any time, and keys of
-- idempotency belong to the account: a rotated API key does not turn a retry
-- into a second charge.
create table accounts (
    account_id uuid not null,
    name text not null,
    created_at timestamptz not null default now(),
    constraint accounts_pkey primary key (account_id),
    constraint accounts_name_length check (char_length(name) between 1 and 200)
);

create table api_keys (
    account_id uuid not null,
    api_key_id uuid not null,
    secret_hash bytea not null,
    created_at timestamptz not null default now(),
    revoked_at timestamptz,
    constraint api_keys_pkey primary key (account_id, api_key_id),
    constraint api_keys_account_id_fkey foreign key (account_id) references accounts (account_id),
    constraint api_keys_secret_hash_length check (octet_length(secret_hash) = 32)
);

-- Every request that is not remembered in memory looks its API key up here.
-- Not unique: a unique index would have to begin with account_id once the
-- tables are distributed, and 190 random bits do not meet.
create index api_keys_secret_hash_idx on api_keys (secret_hash);
