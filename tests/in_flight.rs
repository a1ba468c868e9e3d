//! Promise 5: in flight: wait, then replay; 409 only when the work outlasts the
//! wait. And: the work does not depend on the client that asked for it.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use futures::future::join_all;
use payonce::{charges, idempotency::store, ids::AccountId};
use sqlx::{PgConnection, PgPool};

use crate::support::{
    Service, Settings, command, count, eventually,
    proxy::{Network, Proxy},
    somebody_is_blocked,
};

/// Claims a key as the writer does, and leaves the transaction open: what a
/// replica that stands still looks like from outside.
async fn claim(conn: &mut PgConnection, account_id: AccountId, key: &str, with_lock: bool) {
    if with_lock {
        let locked: bool = sqlx::query_scalar(
            "select pg_try_advisory_xact_lock(hashtextextended($2, uuid_hash_extended($1, 0)))",
        )
        .bind(account_id.0)
        .bind(key)
        .fetch_one(&mut *conn)
        .await
        .unwrap();
        assert!(locked);
    }
    sqlx::query(
        "insert into idempotency_keys (account_id, key, request_hash, operation_id, request_id, created_at, expires_at)
         values ($1, $2, decode(repeat('01', 33), 'hex'), gen_random_uuid(), gen_random_uuid(), now(), now() + interval '1 day')",
    )
    .bind(account_id.0)
    .bind(key)
    .execute(conn)
    .await
    .unwrap();
}

async fn a_held_key_stops_nobody_else(pool: PgPool, with_lock: bool) {
    let wait = Duration::from_millis(700);
    let service = Service::start_with(
        &pool,
        Settings {
            wait,
            ..Settings::default()
        },
    )
    .await;
    let mut holder = pool.begin_with("begin").await.unwrap();
    claim(&mut holder, service.account_id, "held", with_lock).await;

    let started = Instant::now();
    let held = service.charge("held");
    let others: Vec<_> = (0..100)
        .map(|i| service.charge(&format!("order_{i}")).send())
        .collect();
    let (held, others) = futures::future::join(held.send(), join_all(others)).await;
    for other in &others {
        assert_eq!(other.status, 200, "{other:?}");
    }
    held.assert_error(409, "idempotency_key_in_use");
    assert_eq!(held.headers["stripe-should-retry"], "true");
    assert_eq!(held.headers["retry-after"], "1");
    assert!(
        started.elapsed() + Duration::from_millis(30) >= wait,
        "409 came before the wait had passed"
    );
    // A batch that comes later is not held up either.
    assert_eq!(service.charge("later").send().await.status, 200);

    holder.rollback().await.unwrap();
    let now = service.charge("held").send().await;
    assert_eq!(now.status, 200);
    assert!(!now.is_replayed());
    assert_eq!(service.count_charges().await, 102);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_key_held_by_a_replica_that_stands_still_stops_nobody_else(pool: PgPool) {
    a_held_key_stops_nobody_else(pool, true).await;
}

/// Without the try-lock the batch does wait; the lock time-out and the
/// bisection save the others.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_key_held_without_the_lock_stops_nobody_else(pool: PgPool) {
    a_held_key_stops_nobody_else(pool, false).await;
}

/// A row that is committed without an answer is the lock of an operation that
/// has not ended, and is not taken over, whatever its age.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_committed_placeholder_is_in_flight(pool: PgPool) {
    let wait = Duration::from_millis(100);
    let service = Service::start_with(
        &pool,
        Settings {
            wait,
            ..Settings::default()
        },
    )
    .await;
    claim(
        &mut pool.acquire().await.unwrap(),
        service.account_id,
        "held",
        false,
    )
    .await;
    sqlx::query("update idempotency_keys set expires_at = now() - interval '1 day'")
        .execute(&pool)
        .await
        .unwrap();
    service
        .charge("held")
        .send()
        .await
        .assert_error(409, "idempotency_key_in_use");
    assert_eq!(service.count_charges().await, 0);
    assert_eq!(count(&pool, "idempotency_keys").await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_duplicate_waits_for_the_other_replica_and_is_replayed(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.replica();
    let blocker = pool
        .begin_with("begin; lock table charges in share mode")
        .await
        .unwrap();
    let requests: Vec<_> = (0..16)
        .map(|i| {
            tokio::spawn(
                if i % 2 == 0 { &one } else { &other }
                    .charge("order_1")
                    .send(),
            )
        })
        .collect();
    somebody_is_blocked(&pool).await;
    blocker.rollback().await.unwrap();
    let replies: Vec<_> = join_all(requests)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let bodies: HashSet<_> = replies
        .iter()
        .map(|reply| (reply.status.as_u16(), &reply.body))
        .collect();
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    assert_eq!(replies[0].status, 200);
    assert_eq!(one.count_charges().await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_client_says_how_long_it_waits(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut holder = pool.begin_with("begin").await.unwrap();
    claim(&mut holder, service.account_id, "held", true).await;
    let started = Instant::now();
    let at_once = service
        .charge("held")
        .header("prefer", "wait=0")
        .send()
        .await;
    at_once.assert_error(409, "idempotency_key_in_use");
    assert!(
        started.elapsed() < Duration::from_secs(8),
        "it waited for the default of 10 s"
    );

    let hasty = service.replica_with(Settings {
        wait: Duration::from_millis(100),
        ..Settings::default()
    });
    let patient = tokio::spawn(hasty.charge("held").header("prefer", "wait=10").send());
    // Longer than the default wait, which the patient one outlasts.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!patient.is_finished());
    holder.rollback().await.unwrap();
    assert_eq!(patient.await.unwrap().status, 200);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_client_that_hangs_up_changes_nothing(pool: PgPool) {
    let service = Service::start(&pool).await;
    let blocker = pool
        .begin_with("begin; lock table charges in share mode")
        .await
        .unwrap();
    let request = tokio::spawn(service.charge("order_1").send());
    somebody_is_blocked(&pool).await;
    request.abort();
    assert!(request.await.unwrap_err().is_cancelled());
    blocker.rollback().await.unwrap();

    eventually("the charge is there", || async {
        service.count_charges().await == 1
    })
    .await;
    let retry = service.charge("order_1").send().await;
    assert_eq!(retry.status, 200);
    assert!(retry.is_replayed());
    let open: i64 = sqlx::query_scalar(
        "select count(*) from pg_stat_activity
         where datname = current_database() and xact_start is not null and pid <> pg_backend_pid()",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(open, 0, "a transaction stays open");
}

/// The try-lock, by itself: a claim does not wait for one that another
/// transaction has made as the writer does.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_claim_does_not_wait_for_another(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut holder = pool.begin_with("begin").await.unwrap();
    claim(&mut holder, service.account_id, "held", true).await;
    let (held, free) = (
        command(service.account_id, "held"),
        command(service.account_id, "free"),
    );
    let mut other = pool
        .begin_with("begin; set local lock_timeout = '5min'")
        .await
        .unwrap();
    let both = [&held, &free];
    let claims = charges::claim_and_insert(&mut other, &both);
    let claims = tokio::time::timeout(Duration::from_mins(1), claims)
        .await
        .expect("it waits")
        .unwrap();
    assert_eq!(claims, [None, Some(charges::CreateClaim::Charged)]);
}

/// What `free_expired` leaves alone: an answer that is still good, a row without
/// one, and a row that somebody else is at.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn only_an_expired_answer_is_freed(pool: PgPool) {
    let service = Service::start(&pool).await;
    for key in ["good", "expired", "locked"] {
        assert_eq!(service.charge(key).send().await.status, 200);
    }
    let mut conn = pool.acquire().await.unwrap();
    claim(&mut conn, service.account_id, "placeholder", false).await;
    sqlx::query(
        "update idempotency_keys set expires_at = now() - interval '1 day' where key <> 'good'",
    )
    .execute(&pool)
    .await
    .unwrap();
    let _holder = pool
        .begin_with("begin; select from idempotency_keys where key = 'locked' for update")
        .await
        .unwrap();
    let commands = ["good", "expired", "locked", "placeholder", "free"]
        .map(|key| command(service.account_id, key));
    let scopes: Vec<_> = commands.iter().map(|command| &command.scope).collect();
    sqlx::query("set lock_timeout = '1s'")
        .execute(&mut *conn)
        .await
        .unwrap();
    let freed = store::free_expired(&mut conn, &scopes).await.unwrap();
    assert_eq!(freed, [false, true, false, false, false]);
    assert_eq!(count(&pool, "idempotency_keys").await, 3);
}

/// The connection dies silently in mid-transaction, and on the server the
/// transaction lives on and holds the key. It is our own work, so a client that
/// does not want to wait for others is not told 409 about it.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn our_own_transaction_that_lives_on_is_waited_for(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let service = Service::start(&pool).await.behind(&proxy);
    // Both writing tasks have prepared their statement then, and what blocks is
    // its execution, not its preparation.
    for i in 0..6 {
        let before = service.charge(&format!("before_{i}")).send().await;
        assert_eq!(before.status, 200);
    }
    let blocker = pool
        .begin_with("begin; lock table charges in share mode")
        .await
        .unwrap();
    let request = service.charge("order_1").header("prefer", "wait=0");
    let request = tokio::spawn(request.send());
    somebody_is_blocked(&pool).await;
    proxy.set(Network::Frozen);
    blocker.rollback().await.unwrap();
    let in_transaction = || async {
        sqlx::query_scalar(
            "select exists (select from pg_stat_activity
             where datname = current_database() and state = 'idle in transaction')",
        )
        .fetch_one(&pool)
        .await
        .unwrap()
    };
    eventually("our transaction is left open", in_transaction).await;
    proxy.set(Network::Well);
    let reply = request.await.unwrap();
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(service.count_charges().await, 7);
}

/// Somebody changes a table: that is not another request with the key, and is
/// waited for longer than a duplicate waits.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_locked_table_is_waited_for_and_is_no_key_in_use(pool: PgPool) {
    let wait = Duration::from_millis(100);
    let settings = Settings {
        wait,
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await;
    assert_eq!(service.charge("before").send().await.status, 200);
    let lock = pool
        .begin_with("begin; lock table charges in access exclusive mode")
        .await
        .unwrap();
    let requests: Vec<_> = (0..50)
        .map(|i| tokio::spawn(service.charge(&format!("order_{i}")).send()))
        .collect();
    // The time itself is the fault.
    tokio::time::sleep(Duration::from_secs(2)).await;
    lock.rollback().await.unwrap();
    for request in requests {
        let reply = request.await.unwrap();
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    assert_eq!(service.count_charges().await, 51);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_is_cut_off_at_the_end_of_a_shutdown_is_unavailable(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut holder = pool.begin_with("begin").await.unwrap();
    claim(&mut holder, service.account_id, "held", true).await;
    let request = service.charge("held").header("prefer", "wait=10");
    let (cut_off, duplicate) = (
        tokio::spawn(request.send()),
        tokio::spawn(service.charge("held").header("prefer", "wait=10").send()),
    );
    // Until they are with the writer; if that takes longer they are refused at
    // its door, in the same words.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let finished = service
        .app
        .writer
        .shut_down(Duration::from_millis(100))
        .await;
    assert!(!finished);
    for request in [cut_off, duplicate] {
        request.await.unwrap().assert_error(503, "unavailable");
    }
    let late = service.charge("order_1").send().await;
    late.assert_error(503, "unavailable");
    assert!(late.body.contains("stopping"), "{late:?}");
}
