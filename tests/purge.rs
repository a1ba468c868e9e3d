//! The purge removes what has expired, a little at a time, and nothing else.

use futures::future::join_all;
use payonce::{
    db::{ErrorClass, Server},
    idempotency::purge::{self, Purge},
};
use sqlx::{Executor, PgConnection, PgPool};

use crate::support::{Service, count};

async fn fill(pool: &PgPool, rows: i32, expires: &str, answered: bool) {
    let (status, body) = if answered {
        ("200", "'{}'")
    } else {
        ("null", "null")
    };
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "insert into idempotency_keys (account_id, key, request_hash, operation_id, request_id, response_status,
             response_body, created_at, expires_at)
         select gen_random_uuid(), 'old_' || i, decode(repeat('01', 33), 'hex'), gen_random_uuid(), gen_random_uuid(),
             {status}, {body}, now() - interval '2 days', {expires}
         from generate_series(1, {rows}) as i"
    )))
    .execute(pool)
    .await
    .unwrap();
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_has_expired_goes_and_the_rest_stays(pool: PgPool) {
    fill(&pool, 30, "now() - interval '1 second'", true).await;
    fill(&pool, 20, "now() + interval '1 day'", true).await;
    fill(&pool, 10, "now() - interval '30 days'", false).await;
    assert_eq!(
        purge::run_once(&pool, 25).await.unwrap(),
        25,
        "no more than it was told"
    );
    assert_eq!(purge::run_once(&pool, 25).await.unwrap(), 5);
    assert_eq!(purge::run_once(&pool, 25).await.unwrap(), 0);
    assert_eq!(
        count(&pool, "idempotency_keys").await,
        30,
        "kept: not expired, or without an answer"
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_oldest_go_first(pool: PgPool) {
    fill(&pool, 10, "now() - make_interval(secs => i)", true).await;
    purge::run_once(&pool, 4).await.unwrap();
    let left: Vec<String> =
        sqlx::query_scalar("select key from idempotency_keys order by expires_at")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert_eq!(left, ["old_6", "old_5", "old_4", "old_3", "old_2", "old_1"]);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_row_that_somebody_holds_is_not_waited_for(pool: PgPool) {
    fill(&pool, 10, "now() - interval '1 second'", true).await;
    let mut holder = pool.begin_with("begin").await.unwrap();
    sqlx::query("select from idempotency_keys where key = 'old_3' for update")
        .execute(&mut *holder)
        .await
        .unwrap();
    assert_eq!(purge::run_until_done(&pool).await.unwrap(), 9);
    holder.rollback().await.unwrap();
    assert_eq!(purge::run_until_done(&pool).await.unwrap(), 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn charges_go_on_meanwhile(pool: PgPool) {
    let service = Service::start(&pool).await;
    fill(&pool, 20_000, "now() - interval '1 second'", true).await;
    let purges = join_all([purge::run_until_done(&pool), purge::run_until_done(&pool)]);
    let charges = join_all((0..200).map(|i| service.charge(&format!("order_{i}")).send()));
    let (purged, charges) = futures::future::join(purges, charges).await;
    assert_eq!(purged.into_iter().map(Result::unwrap).sum::<u64>(), 20_000);
    assert!(charges.iter().all(|reply| reply.status == 200));
    assert_eq!(count(&pool, "idempotency_keys").await, 200);
    assert_eq!(service.count_charges().await, 200);
}

/// How many entries of the index on `expires_at` this transaction has walked past,
/// those of deleted rows among them.
async fn entries_read(conn: &mut PgConnection) -> i64 {
    sqlx::query_scalar(
        "select pg_stat_get_xact_tuples_returned('idempotency_keys_expires_at_idx'::regclass)",
    )
    .fetch_one(conn)
    .await
    .unwrap()
}

/// As the service's pool sends it, and then committed.
async fn step(pool: &PgPool, purge: &mut Purge, limit: i64) -> (u64, i64) {
    let pool = Server::direct((*pool.connect_options()).clone()).pool(1);
    let mut transaction = pool.begin_with("begin").await.unwrap();
    let deleted = purge.step(&mut *transaction, limit).await.unwrap();
    let read = entries_read(&mut transaction).await;
    transaction.commit().await.unwrap();
    (deleted, read)
}

/// While an old snapshot is held, what was deleted stays in the index.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_step_does_not_walk_past_what_was_deleted_before(pool: PgPool) {
    fill(
        &pool,
        4000,
        "now() - interval '1 hour' + make_interval(secs => 0.001 * i)",
        true,
    )
    .await;
    fill(&pool, 4000, "now() + interval '1 day'", true).await;
    let mut snapshot = pool
        .begin_with("begin isolation level repeatable read")
        .await
        .unwrap();
    snapshot
        .execute("select count(*) from idempotency_keys")
        .await
        .unwrap();

    let mut purge = Purge::default();
    for i in 0..40 {
        // As the statistics come and go.
        if i == 20 {
            pool.execute("analyze idempotency_keys").await.unwrap();
        }
        let (deleted, read) = step(&pool, &mut purge, 100).await;
        assert_eq!(deleted, 100);
        // These, the one where the last step ended, and the few that the planner looks
        // at; not the 100 of each step before.
        assert!(read <= 120, "step {i} walked past {read} entries");
    }
    // So does a replica that was too late for each of them.
    let mut other = Purge::default();
    let (deleted, read) = step(&pool, &mut other, 100).await;
    assert_eq!(deleted, 0);
    assert!(read >= 4000, "nothing held them: {read}");
    for purge in [&mut purge, &mut other] {
        step(&pool, purge, 100).await;
        let (deleted, read) = step(&pool, purge, 100).await;
        assert_eq!(deleted, 0);
        assert!(read <= 20, "walked past {read} entries at rest");
    }
    snapshot.rollback().await.unwrap();
    assert_eq!(count(&pool, "idempotency_keys").await, 4000);
}

/// What has expired meanwhile is found from where it was, and what was left behind
/// when it begins anew.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_was_left_behind_goes_with_the_next_sweep(pool: PgPool) {
    let mut purge = Purge::default();
    fill(&pool, 10, "now() - make_interval(secs => i)", true).await;
    let mut holder = pool.begin_with("begin").await.unwrap();
    holder
        .execute("select from idempotency_keys where key in ('old_3', 'old_7') for update")
        .await
        .unwrap();
    assert_eq!(purge.run_until_done(&pool).await.unwrap(), 8);
    holder.rollback().await.unwrap();
    pool.execute("update idempotency_keys set expires_at = clock_timestamp() where key = 'old_3'")
        .await
        .unwrap();
    assert_eq!(purge.run_until_done(&pool).await.unwrap(), 1);
    assert_eq!(purge.run_until_done(&pool).await.unwrap(), 0);
    purge.start_over();
    assert_eq!(purge.run_until_done(&pool).await.unwrap(), 1);
    assert_eq!(count(&pool, "idempotency_keys").await, 0);
}

/// Rows that all expire at one time, more than a step takes; and those without a
/// beginning.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn rows_that_expire_together_all_go(pool: PgPool) {
    for expires in ["'2026-01-01'", "'-infinity'", "'1969-01-01'"] {
        fill(&pool, 250, expires, true).await;
        let mut purge = Purge::default();
        for deleted in [100, 100, 50, 0] {
            assert_eq!(purge.step(&pool, 100).await.unwrap(), deleted, "{expires}");
        }
    }
}

/// Where the walk from the oldest row takes too long, the purge does not stall.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_sweep_that_takes_too_long_stops_nothing(pool: PgPool) {
    let options = (*pool.connect_options()).clone();
    let impatient = PgPool::connect_lazy_with(options.options([("statement_timeout", "100ms")]));
    let too_long = async |purge: &mut Purge| {
        let mut holder = pool
            .begin_with("begin; lock table idempotency_keys")
            .await
            .unwrap();
        let error = purge.run_until_done(&impatient).await.unwrap_err();
        assert_eq!(ErrorClass::of(&error), ErrorClass::TimedOut, "{error}");
        holder.execute("rollback").await.unwrap();
    };
    fill(&pool, 10, "now() - interval '2 days'", true).await;
    fill(&pool, 3, "now() - interval '1 minute'", true).await;

    // One that was just started goes on with what has expired in the last hour.
    let mut purge = Purge::default();
    too_long(&mut purge).await;
    assert_eq!(purge.run_until_done(&pool).await.unwrap(), 3);
    // Another goes on from where it was, which is after the last of these.
    purge.start_over();
    too_long(&mut purge).await;
    fill(&pool, 5, "now() - interval '1 minute'", true).await;
    fill(&pool, 2, "clock_timestamp()", true).await;
    assert_eq!(purge.run_until_done(&pool).await.unwrap(), 2);
    purge.start_over();
    assert_eq!(purge.run_until_done(&pool).await.unwrap(), 15);
}
