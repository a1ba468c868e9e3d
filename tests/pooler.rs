//! The promises through PgBouncer in transaction mode, where each transaction
//! may meet another session.

use std::collections::HashSet;

use futures::future::join_all;
use payonce::db::{self, PreflightError, Server};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::process::Command;

use crate::support::{
    Service, Settings, count, eventually, make_account, persistently,
    pgbouncer::PgBouncer,
    postgres::Cluster,
    process::{BINARY, Process},
};

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn two_replicas_behind_a_pooler_charge_once(pool: PgPool) {
    let Some(pgbouncer) = PgBouncer::before(&pool).await else {
        return;
    };
    let one = Service::start(&pool).await.behind_pooler(&pgbouncer);
    let other = one.behind_pooler(&pgbouncer);
    for round in 0..10 {
        let key = format!("order_{round}");
        let replies =
            join_all((0..64).map(|i| if i % 2 == 0 { &one } else { &other }.charge(&key).send()))
                .await;
        let bodies: HashSet<_> = replies
            .iter()
            .map(|reply| (reply.status.as_u16(), &reply.body))
            .collect();
        assert_eq!(bodies.len(), 1, "{bodies:?}");
        assert_eq!(replies[0].status, 200);
        let id = replies[0].charge_id();
        assert_eq!(
            other.get(&format!("/v1/charges/{id}")).send().await.body,
            replies[0].body
        );
        assert_eq!(
            one.get("/v1/charges?limit=1").send().await.value()["data"][0]["id"],
            id
        );
        assert_eq!(one.count_charges().await, round + 1);
    }
    assert_eq!(one.get("/readyz").send().await.status, 200);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn everything_that_is_written_behind_a_pooler_is_kept(pool: PgPool) {
    let Some(pgbouncer) = PgBouncer::before(&pool).await else {
        return;
    };
    let service = Service::start(&pool).await;
    let forgetful = service.replica_with(Settings {
        answer_ttl: std::time::Duration::from_micros(1),
        ..Settings::default()
    });
    let forgetful = forgetful.behind_pooler(&pgbouncer);
    let first = forgetful.charge("order_1").send().await;
    // Expired, and after the purge through the pooler: all the statements there are.
    assert_eq!(forgetful.charge("order_1").send().await.body, first.body);
    payonce::idempotency::purge::run_until_done(&forgetful.app.pool)
        .await
        .unwrap();
    eventually("the purge is committed", || async {
        count(&pool, "idempotency_keys").await == 0
    })
    .await;
    assert_eq!(forgetful.charge("order_1").send().await.body, first.body);
    let other = forgetful
        .post("/v1/charges", "order_1")
        .json(&json!({"amount": 1, "currency": "usd"}))
        .send()
        .await;
    other.assert_error(422, "idempotency_key_reused");
    assert_eq!(service.count_charges().await, 1);
}

/// The settings are in force in every transaction, whatever session it meets.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_key_that_is_held_stops_nobody_behind_a_pooler(pool: PgPool) {
    let Some(pgbouncer) = PgBouncer::before(&pool).await else {
        return;
    };
    let service = Service::start(&pool).await.behind_pooler(&pgbouncer);
    let mut holder = pool.begin_with("begin").await.unwrap();
    sqlx::query(
        "insert into idempotency_keys (account_id, key, request_hash, operation_id, request_id, created_at, expires_at)
         values ($1, 'held', decode(repeat('01', 33), 'hex'), gen_random_uuid(), gen_random_uuid(), now(), now() + interval '1 day')",
    )
    .bind(service.account_id.0)
    .execute(&mut *holder)
    .await
    .unwrap();
    let held = service.charge("held").header("prefer", "wait=1").send();
    let others = join_all(
        (0..30)
            .map(|i| service.charge(&format!("order_{i}")).send())
            .collect::<Vec<_>>(),
    );
    let (held, others) = futures::future::join(held, others).await;
    held.assert_error(409, "idempotency_key_in_use");
    assert!(others.iter().all(|reply| reply.status == 200));
    holder.rollback().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_restarts_behind_a_pooler_and_no_request_notices() {
    let cluster = Cluster::start("test-pooler").await;
    let pool = cluster.pool().await;
    let Some(pgbouncer) = PgBouncer::before(&pool).await else {
        return;
    };
    let service = Service::start(&pool).await.behind_pooler(&pgbouncer);
    for mode in ["fast", "immediate"] {
        let requests: Vec<_> = (0..8)
            .map(|client| {
                let service = service.clone();
                tokio::spawn(async move {
                    for i in 0..100 {
                        let key = format!("order_{mode}_{client}_{i}");
                        let (reply, _) = persistently(|| service.charge(&key)).await;
                        assert_eq!(reply.status, 200, "{reply:?}");
                    }
                })
            })
            .collect();
        let before = count(&pool, "charges").await;
        eventually("charges are made", || async {
            count(&pool, "charges").await > before + 20
        })
        .await;
        cluster.restart(mode).await;
        for request in requests {
            request.await.unwrap();
        }
    }
    assert_eq!(count(&cluster.pool().await, "charges").await, 1600);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_storm_goes_through_a_pooler(pool: PgPool) {
    let Some(pgbouncer) = PgBouncer::before(&pool).await else {
        return;
    };
    let (_, api_key) = make_account(&pool).await;
    let url = pgbouncer.url(&pool);
    let setting = [("TRANSACTION_POOLER", "true")];
    let (one, other) = (
        Process::serve_with(&url, &setting).await,
        Process::serve_with(&url, &setting).await,
    );
    let output = Command::new(BINARY)
        .args(["storm", "--json", "--customers", "300"])
        .args([
            "--target",
            &format!("http://{}", one.address),
            "--target",
            &format!("http://{}", other.address),
        ])
        .env("PAYONCE_API_KEY", &api_key)
        .output()
        .await
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for count in [
        "double_charges",
        "lost_charges",
        "differing_answers",
        "unanswered_keys",
    ] {
        assert_eq!(report[count], 0, "{report}");
    }
    assert!(output.status.success());
    assert_eq!(report["charges_made"], 300);
}

/// Without the setting it does not start, and says what to do, whether the
/// pooler refuses our session's settings or drops them.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_pooler_without_the_setting_is_refused(pool: PgPool) {
    let Some(refuses) = PgBouncer::before(&pool).await else {
        return;
    };
    let drops = "ignore_startup_parameters = options, extra_float_digits";
    let Some(drops) = PgBouncer::with(&pool, drops).await else {
        return;
    };
    for pgbouncer in [&refuses, &drops] {
        let output = Command::new(BINARY)
            .arg("serve")
            .env("DATABASE_URL", pgbouncer.url(&pool))
            .output()
            .await
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(said.contains("TRANSACTION_POOLER=true"), "{said}");
    }
    let direct = Server::direct(drops.options(&pool.connect_options()));
    let refused = db::check(&direct).await;
    assert!(
        matches!(
            refused,
            Err(PreflightError::SettingIgnored {
                name: "lock_timeout",
                ..
            })
        ),
        "{refused:?}"
    );
    db::check(&Server::behind_pooler(
        refuses.options(&pool.connect_options()),
    ))
    .await
    .unwrap();
}
