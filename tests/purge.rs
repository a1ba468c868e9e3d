//! The purge removes what has expired, a little at a time, and nothing else.

use futures::future::join_all;
use payonce::idempotency::purge;
use sqlx::PgPool;

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
