//! Promise 6: a fault never burns a key. After it the same key is always the
//! right one to ask again with.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use axum::body::{Body, Bytes};
use futures::future::join_all;
use serde_json::json;
use sqlx::{AssertSqlSafe, PgPool};

use crate::support::{
    Service, Settings, are_blocked, count, eventually,
    proxy::{Network, Proxy},
};

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_validation_error_is_not_stored(pool: PgPool) {
    let service = Service::start(&pool).await;
    for body in [
        json!({"amount": -1, "currency": "usd"}),
        json!({"amount": 5000, "currency": "usd", "customer": "cus_ABC123", "source": "tok_nothing"}),
    ] {
        let wrong = service
            .post("/v1/charges", "order_1")
            .json(&body)
            .send()
            .await;
        assert_eq!(wrong.status, 400);
    }
    assert_eq!(count(&pool, "idempotency_keys").await, 0);
    let right = service.charge("order_1").send().await;
    assert_eq!(right.status, 200);
    assert!(!right.is_replayed());
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_poisoned_command_fails_alone_and_its_key_works_again(pool: PgPool) {
    let service = Service::start(&pool).await;
    sqlx::query("alter table charges add constraint poison check (amount not in (666, 667))")
        .execute(&pool)
        .await
        .unwrap();
    let charge = |i: i64| {
        let amount = match i {
            33 => 666,
            77 => 667,
            _ => 5000,
        };
        service
            .post("/v1/charges", &format!("order_{i}"))
            .json(&json!({"amount": amount, "currency": "usd"}))
            .send()
    };
    let replies = join_all((0..100).map(charge)).await;
    for (i, reply) in replies.iter().enumerate() {
        if matches!(i, 33 | 77) {
            reply.assert_error(500, "internal");
            assert_eq!(reply.headers["stripe-should-retry"], "true");
            assert!(!reply.body.contains("poison"), "it tells of our insides");
        } else {
            assert_eq!(reply.status, 200, "{reply:?}");
        }
    }
    assert_eq!(service.count_charges().await, 98);
    assert_eq!(count(&pool, "idempotency_keys").await, 98);

    sqlx::query("alter table charges drop constraint poison")
        .execute(&pool)
        .await
        .unwrap();
    let healed = charge(33).await;
    assert_eq!(healed.status, 200);
    assert!(!healed.is_replayed());
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_full_queue_refuses_at_once_and_the_key_works_later(pool: PgPool) {
    let settings = Settings {
        queue_max: 4,
        batch_max: 2,
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await;
    let blocker = pool
        .begin_with("begin; lock table charges in share mode")
        .await
        .unwrap();
    let requests: Vec<_> = (0..20)
        .map(|i| tokio::spawn(service.charge(&format!("order_{i}")).send()))
        .collect();
    let full = || async {
        requests
            .iter()
            .filter(|request| request.is_finished())
            .count()
            == 16
    };
    eventually(
        "all that find no place are refused while the others wait",
        full,
    )
    .await;
    blocker.rollback().await.unwrap();
    let replies: Vec<_> = join_all(requests)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let (taken, refused): (Vec<_>, Vec<_>) = replies.iter().partition(|reply| reply.status == 200);
    assert_eq!((taken.len(), refused.len()), (4, 16));
    for reply in refused {
        reply.assert_error(503, "unavailable");
        assert_eq!(reply.headers["retry-after"], "1");
    }
    for i in 0..20 {
        assert_eq!(
            service.charge(&format!("order_{i}")).send().await.status,
            200
        );
    }
    assert_eq!(service.count_charges().await, 20);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_database_that_stays_away_gives_503_and_the_key_works_later(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let settings = Settings {
        wait: Duration::from_secs(2),
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await.behind(&proxy);
    // Known already, so that the write path is what has to ride it out.
    assert_eq!(service.charge("order_0").send().await.status, 200);
    proxy.set(Network::Down);
    let started = Instant::now();
    let (first, duplicate) = futures::future::join(
        service.charge("order_1").send(),
        service.charge("order_1").send(),
    )
    .await;
    first.assert_error(503, "unavailable");
    assert!(
        started.elapsed() >= Duration::from_secs(9),
        "it gave up before its deadline"
    );
    duplicate.assert_error(409, "idempotency_key_in_use");
    service
        .get("/readyz")
        .send()
        .await
        .assert_error(503, "unavailable");
    assert_eq!(service.get("/healthz").send().await.status, 200);

    proxy.set(Network::Well);
    let retry = service.charge("order_1").send().await;
    assert_eq!(retry.status, 200);
    assert_eq!(service.count_charges().await, 2);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_table_that_is_not_there_is_not_ready_and_burns_nothing(pool: PgPool) {
    let service = Service::start(&pool).await;
    assert_eq!(service.get("/readyz").send().await.status, 200);
    sqlx::query("alter table charges rename to elsewhere")
        .execute(&pool)
        .await
        .unwrap();
    service
        .charge("order_1")
        .send()
        .await
        .assert_error(503, "unavailable");
    service
        .get("/readyz")
        .send()
        .await
        .assert_error(503, "unavailable");
    sqlx::query("alter table elsewhere rename to charges")
        .execute(&pool)
        .await
        .unwrap();
    assert_eq!(service.get("/readyz").send().await.status, 200);
    assert_eq!(service.charge("order_1").send().await.status, 200);
}

/// A connection that the server ends between two batches is not the client's
/// problem.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn connections_that_the_server_ends_are_replaced(pool: PgPool) {
    let service = Service::start(&pool).await;
    for round in 0..5 {
        let reply = service.charge(&format!("order_{round}")).send().await;
        assert_eq!(reply.status, 200);
        assert!(!reply.is_replayed());
        sqlx::query(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid() and application_name = 'payonce'",
        )
        .execute(&pool)
        .await
        .unwrap();
    }
    assert_eq!(service.count_charges().await, 5);
}

/// What the database says once, and what the client gets then: nothing of it,
/// or 503 where the same again cannot help. The key works afterwards.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_state_that_passes_is_not_seen_and_a_shortage_is_503(pool: PgPool) {
    let service = Service::start(&pool).await;
    sqlx::raw_sql("create sequence times")
        .execute(&pool)
        .await
        .unwrap();
    for (status, states) in [
        (
            200,
            &[
                "40000", "40001", "40P01", "25P02", "25P04", "26000", "42P05", "0A000", "57P01",
                "08006",
            ][..],
        ),
        (
            503,
            &[
                "53100", "53200", "53400", "58030", "3F000", "42703", "42883", "42501",
            ],
        ),
        (500, &["22003", "23514", "XX000"]),
    ] {
        for state in states {
            let raise_once = format!(
                "create or replace function raise_once() returns trigger language plpgsql as $$ begin
                     if nextval('times') = 1 then raise exception 'once' using errcode = '{state}'; end if;
                     return new;
                 end $$;
                 alter sequence times restart;
                 create or replace trigger raise_once before insert on charges
                     for each row execute function raise_once()"
            );
            sqlx::raw_sql(AssertSqlSafe(raise_once))
                .execute(&pool)
                .await
                .unwrap();
            let reply = service.charge(state).send().await;
            assert_eq!(reply.status, status, "{state}: {reply:?}");
            let again = service.charge(state).send().await;
            assert_eq!(again.status, 200, "{state}: {again:?}");
            assert_eq!(again.is_replayed(), status == 200, "{state}");
        }
    }
}

/// Reads whose connections died silently in the middle give up, and do not take
/// their places in the pool with them.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn reads_come_back_after_their_connections_died_silently(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let service = Service::start(&pool).await.behind(&proxy);
    let id = service.charge("order_1").send().await.charge_id();
    // A list goes over the pool, a charge by its id over the reader.
    let by_id = format!("/v1/charges/{id}");
    let paths = ["/v1/charges", "/v1/charges?limit=1", by_id.as_str()];
    for path in paths {
        assert_eq!(service.get(path).send().await.status, 200);
    }
    let lock = pool
        .begin_with("begin; lock table charges in access exclusive mode")
        .await
        .unwrap();
    // As many as the pool has connections, and one.
    let reads = paths.map(|path| tokio::spawn(service.get(path).send()));
    are_blocked(&pool, 3).await;
    proxy.set(Network::Frozen);
    lock.rollback().await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    proxy.set(Network::Well);
    for read in reads {
        let read = read.await.unwrap();
        assert_eq!(read.status, 200, "{read:?}");
    }
    for path in paths {
        assert_eq!(service.get(path).send().await.status, 200);
    }
}

/// Ten seconds for the exchange, and not for each of its parts.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_happens_on_the_way_takes_from_the_requests_time(pool: PgPool) {
    let service = Service::start(&pool).await.with_cold_callers();
    let lock = |table| {
        let begin = format!("begin; lock table {table} in access exclusive mode");
        pool.begin_with(AssertSqlSafe(begin))
    };
    let callers = lock("api_keys").await.unwrap();
    let started = Instant::now();
    let requests = [
        service.charge("order_1").header("prefer", "wait=10"),
        service.get("/v1/charges"),
    ]
    .map(|call| tokio::spawn(call.send()));
    // The time itself is the fault.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let _charges = lock("charges").await.unwrap();
    callers.rollback().await.unwrap();
    for request in requests {
        request.await.unwrap().assert_error(503, "unavailable");
    }
    // 16 s and more where each part has its own ten.
    assert!(
        started.elapsed() < Duration::from_secs(14),
        "{:?}",
        started.elapsed()
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_body_that_never_ends_is_given_up(pool: PgPool) {
    let service = Service::start(&pool).await;
    let never = Body::from_stream(futures::stream::pending::<Result<Bytes, Infallible>>());
    let call = service
        .post("/v1/charges", "order_1")
        .header("content-type", "application/json")
        .body(never);
    call.send().await.assert_error(503, "unavailable");
    assert_eq!(service.charge("order_1").send().await.status, 200);
}
