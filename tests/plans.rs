//! No statement of the service reads a table from end to end, although all of
//! them were planned while the tables were empty and keep their plans.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use payonce::{
    accounts,
    charges::{self, CreateCharge},
    db::Server,
    idempotency::store,
    ids::{AccountId, ChargeId, RefundId, RequestId},
    money::{Amount, Currency},
    pagination::{Cursor, Page},
    refunds::{self, Refund},
};
use sqlx::{
    Connection, Executor, PgConnection, PgPool, Postgres, pool::PoolConnection, types::Uuid,
};

use crate::support::command;

/// After so many executions PostgreSQL settles for a generic plan.
const UNTIL_GENERIC: usize = 8;
const ROWS: i64 = 20_000;
const BATCH: i64 = 64;

const ACCOUNT: AccountId = AccountId(sqlx::types::Uuid::from_u128(7));

/// A connection as the service has them, on which every statement has been
/// planned for good while the tables were empty.
struct Planned {
    writer: PgConnection,
    reader: PoolConnection<Postgres>,
    pool: PgPool,
}

/// Each of the statements once, in a transaction that is rolled back.
#[derive(Debug, Clone, Copy)]
enum Statement {
    ClaimAndInsert,
    Read,
    FreeExpired,
    ClaimAndAnswer,
    Withdraw,
    ByKey,
    LockAndSave,
    RefundsByKey,
    InsertRefunds,
    Find,
    List,
    ListOfCustomer,
    ListBackwards,
    ListRefunds,
    ListRefundsOfCharge,
    OfKey,
    RefundOfKey,
    Authenticate,
    Purge,
}

/// Those that insert come last: a row that was rolled back leaves a page, and a
/// table without any is the worst case for a plan.
const ALL: [Statement; 19] = [
    Statement::Read,
    Statement::FreeExpired,
    Statement::ByKey,
    Statement::Find,
    Statement::List,
    Statement::ListBackwards,
    Statement::ListRefunds,
    Statement::OfKey,
    Statement::RefundOfKey,
    Statement::LockAndSave,
    Statement::RefundsByKey,
    Statement::Authenticate,
    Statement::Purge,
    Statement::Withdraw,
    Statement::InsertRefunds,
    Statement::ClaimAndAnswer,
    Statement::ClaimAndInsert,
    Statement::ListOfCustomer,
    Statement::ListRefundsOfCharge,
];

impl Statement {
    /// Whether it is a list that could be read in its order by one index, or in
    /// its selection by another.
    fn is_filtered(self) -> bool {
        matches!(self, Self::ListOfCustomer | Self::ListRefundsOfCharge)
    }

    /// Runs it, and says how many rows of ours it fetched or read past.
    async fn run(self, conn: &mut PgConnection) -> i64 {
        // Old keys, so that there is something to find, and for the claim new ones.
        let prefix = if matches!(self, Self::ClaimAndInsert) {
            "new"
        } else {
            "old"
        };
        let commands: Vec<_> = (1..=BATCH)
            .map(|i| command(ACCOUNT, &format!("{prefix}_{i}")))
            .collect();
        let scopes: Vec<_> = commands.iter().map(|command| &command.scope).collect();
        let mut transaction = conn.begin().await.unwrap();
        let tx = &mut *transaction;
        let there: BTreeSet<_> = sqlx::query_scalar("select charge_id from charges limit $1")
            .bind(BATCH)
            .fetch_all(&mut *tx)
            .await
            .unwrap()
            .into_iter()
            .map(|id| (ACCOUNT, ChargeId(id)))
            .collect();
        let middle = Page {
            limit: 10,
            from: Cursor::After(Uuid::from_u128(u128::MAX / 2)),
            oldest: None,
            newest: None,
        };
        let backwards = Page {
            from: Cursor::Before(Uuid::from_u128(u128::MAX / 2)),
            ..middle.clone()
        };
        let one = there.first().map_or_else(ChargeId::new, |there| there.1);
        let before = rows_read(tx).await;
        match self {
            Self::ClaimAndInsert => {
                let commands: Vec<_> = commands.iter().collect();
                charges::claim_and_insert(tx, &commands).await.map(drop)
            }
            Self::Read => store::read(tx, &scopes).await.map(drop),
            Self::FreeExpired => store::free_expired(tx, &scopes).await.map(drop),
            Self::ClaimAndAnswer => {
                let rows: Vec<_> = commands.iter().map(CreateCharge::row).collect();
                store::claim(tx, &rows).await.unwrap();
                store::answer(tx, &rows).await
            }
            Self::Withdraw => {
                let commands: Vec<_> = commands.iter().collect();
                charges::undo_create(tx, &commands).await
            }
            Self::ByKey => charges::by_key(tx, &scopes).await.map(drop),
            Self::Find => {
                let ids: Vec<_> = there.iter().copied().collect();
                charges::find(tx, &ids).await.map(drop)
            }
            Self::List => charges::list(&mut *tx, ACCOUNT, None, &middle)
                .await
                .map(drop),
            Self::ListBackwards => charges::list(&mut *tx, ACCOUNT, None, &backwards)
                .await
                .map(drop),
            Self::ListOfCustomer => charges::list(&mut *tx, ACCOUNT, Some("cus_7"), &middle)
                .await
                .map(drop),
            Self::ListRefunds => refunds::list(&mut *tx, ACCOUNT, None, &backwards)
                .await
                .map(drop),
            Self::ListRefundsOfCharge => refunds::list(&mut *tx, ACCOUNT, Some(one), &middle)
                .await
                .map(drop),
            Self::OfKey => charges::of_key(&mut *tx, scopes[0]).await.map(drop),
            Self::RefundOfKey => refunds::of_key(&mut *tx, scopes[0]).await.map(drop),
            Self::RefundsByKey => refunds::by_key(tx, &scopes).await.map(drop),
            Self::LockAndSave => {
                let locked = charges::lock(tx, &there).await.unwrap();
                charges::save(tx, &locked.values().collect::<Vec<_>>()).await
            }
            Self::InsertRefunds => {
                let refunds: Vec<_> = commands.iter().map(|_| refund(one)).collect();
                let rows: Vec<refunds::Keyed<'_>> = commands
                    .iter()
                    .zip(&refunds)
                    .map(|(c, refund)| (&c.scope, false, c.fingerprint, refund))
                    .collect();
                refunds::insert(tx, &rows).await
            }
            Self::Authenticate => accounts::authenticate(&mut *tx, [7; 32]).await.map(drop),
            Self::Purge => payonce::idempotency::purge::run_once(&mut *tx, 10)
                .await
                .map(drop),
        }
        .unwrap();
        let touched = rows_read(tx).await - before;
        transaction.rollback().await.unwrap();
        touched
    }
}

fn refund(charge: ChargeId) -> Refund {
    Refund {
        id: RefundId::new(),
        request_id: RequestId::new(),
        charge,
        amount: Amount::new(1).unwrap(),
        currency: Currency::from_code("usd").unwrap(),
        reason: None,
        metadata: BTreeMap::new(),
    }
}

/// How many rows of tables this session has read in all.
async fn rows_read(conn: &mut PgConnection) -> i64 {
    sqlx::query_scalar(
        "select coalesce(sum(seq_tup_read + coalesce(idx_tup_fetch, 0)), 0)::int8 from pg_stat_xact_user_tables",
    )
    .fetch_one(conn)
    .await
    .unwrap()
}

impl Planned {
    async fn on_empty_tables(pool: PgPool) -> Self {
        // Vacuumed, so that the planner knows that they are empty.
        for table in ["idempotency_keys", "charges", "refunds", "api_keys"] {
            sqlx::query(sqlx::AssertSqlSafe(format!("vacuum analyze {table}")))
                .execute(&pool)
                .await
                .unwrap();
        }
        let server = Server::direct((*pool.connect_options()).clone());
        let writer = server.connect().await.unwrap().conn;
        let reader = server.pool(1).acquire().await.unwrap();
        let mut planned = Self {
            writer,
            reader,
            pool,
        };
        for statement in ALL {
            for _ in 0..UNTIL_GENERIC {
                planned.run(statement).await;
            }
        }
        planned
    }

    /// Runs it where the service runs it.
    async fn run(&mut self, statement: Statement) -> i64 {
        use Statement::{
            Authenticate, ByKey, ClaimAndAnswer, ClaimAndInsert, Find, FreeExpired, InsertRefunds,
            List, ListBackwards, ListOfCustomer, ListRefunds, ListRefundsOfCharge, LockAndSave,
            OfKey, Purge, Read, RefundOfKey, RefundsByKey, Withdraw,
        };
        match statement {
            ClaimAndInsert | Read | FreeExpired | ClaimAndAnswer | Withdraw | ByKey | Find
            | LockAndSave | RefundsByKey | InsertRefunds => statement.run(&mut self.writer).await,
            List | ListOfCustomer | ListBackwards | ListRefunds | ListRefundsOfCharge | OfKey
            | RefundOfKey | Authenticate | Purge => statement.run(&mut self.reader).await,
        }
    }

    /// Without ANALYZE, which would have the plans made anew; autovacuum is kept
    /// from doing so.
    async fn grow(&self) {
        for statement in [
            "insert into idempotency_keys (account_id, key, request_hash, operation_id, request_id, response_status,
                 response_body, created_at, expires_at)
             select $1, 'old_' || i, decode(repeat('01', 33), 'hex'), gen_random_uuid(), gen_random_uuid(), 200, '{}',
                 now() - interval '2 days', now() - interval '1 day'
             from generate_series(1, $2) as i",
            "insert into charges (account_id, charge_id, idempotency_key, request_hash, request_id, amount, currency,
                 metadata, capture, status, created_at, customer)
             select $1, gen_random_uuid(), 'old_' || i, decode(repeat('01', 33), 'hex'), gen_random_uuid(), 5000, 'usd', '{}',
                 true, 'succeeded', now(), 'cus_' || i % 1000
             from generate_series(1, $2) as i",
            "insert into refunds (account_id, refund_id, charge_id, idempotency_key, request_hash, request_id, amount,
                 currency, metadata, created_at)
             select $1, gen_random_uuid(), (select charge_id from charges limit 1), 'old_' || i,
                 decode(repeat('01', 33), 'hex'), gen_random_uuid(), 1, 'usd', '{}'::jsonb, now()
             from generate_series(1, 100) as i where $2 > 0
             union all
             select $1, gen_random_uuid(), gen_random_uuid(), 'older_' || i,
                 decode(repeat('01', 33), 'hex'), gen_random_uuid(), 1, 'usd', '{}'::jsonb, now()
             from generate_series(1, $2) as i",
        ] {
            sqlx::query(statement).bind(ACCOUNT.0).bind(ROWS).execute(&self.pool).await.unwrap();
        }
        sqlx::query("insert into accounts (account_id, name) values ($1, 'a merchant')")
            .bind(ACCOUNT.0)
            .execute(&self.pool)
            .await
            .unwrap();
        sqlx::query(
            "insert into api_keys (account_id, api_key_id, secret_hash)
             select $1, gen_random_uuid(), sha256(int8send(i)) from generate_series(1, $2) as i",
        )
        .bind(ACCOUNT.0)
        .bind(ROWS)
        .execute(&self.pool)
        .await
        .unwrap();
    }
}

/// Indexes that cost the same are told apart by the order in which they were
/// made, and a restored dump has another order than the migrations.
const REMADE: [&str; 3] = [
    "select",
    "alter table charges drop constraint charges_pkey;
     alter table charges add constraint charges_pkey primary key (account_id, charge_id);
     alter table refunds drop constraint refunds_pkey;
     alter table refunds add constraint refunds_pkey primary key (account_id, refund_id);
     drop index charges_customer_idx;
     create index charges_customer_idx on charges (account_id, customer, charge_id)
         where customer is not null;
     alter table idempotency_keys drop constraint idempotency_keys_pkey;
     alter table idempotency_keys add constraint idempotency_keys_pkey primary key (account_id, key)",
    "alter table charges drop constraint charges_idempotency_key_key;
     alter table charges add constraint charges_idempotency_key_key unique (account_id, idempotency_key);
     drop index refunds_charge_id_idx;
     create index refunds_charge_id_idx on refunds (account_id, charge_id, refund_id);
     alter table refunds drop constraint refunds_idempotency_key_key;
     alter table refunds add constraint refunds_idempotency_key_key unique (account_id, idempotency_key);
     drop index idempotency_keys_expires_at_idx;
     create index idempotency_keys_expires_at_idx on idempotency_keys (expires_at)",
];

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_statement_planned_on_empty_tables_uses_the_index_when_they_have_grown(pool: PgPool) {
    sqlx::raw_sql(
        "alter table idempotency_keys set (autovacuum_enabled = off);
         alter table charges set (autovacuum_enabled = off);
         alter table refunds set (autovacuum_enabled = off);
         alter table api_keys set (autovacuum_enabled = off)",
    )
    .execute(&pool)
    .await
    .unwrap();
    for remade in REMADE {
        sqlx::raw_sql("truncate idempotency_keys, charges, refunds, api_keys, accounts")
            .execute(&pool)
            .await
            .unwrap();
        sqlx::raw_sql(remade).execute(&pool).await.unwrap();
        let mut planned = Planned::on_empty_tables(pool.clone()).await;
        planned.grow().await;
        for statement in ALL {
            if statement.is_filtered() {
                // Which of two indexes to walk along is a question of numbers:
                // they are planned per execution, and by then the server knows.
                pool.execute("analyze charges, refunds").await.unwrap();
            }
            let run = planned.run(statement);
            let touched = tokio::time::timeout(Duration::from_mins(1), run)
                .await
                .unwrap();
            // A few rows per command, as against all 20,000.
            assert!(
                touched <= 4 * BATCH,
                "{statement:?} read {touched} rows after {remade}"
            );
        }
    }
}
