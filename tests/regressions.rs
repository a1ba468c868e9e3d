//! Defects that a review found, each in its smallest form.

use std::time::Duration;

use axum::{
    Router,
    body::Body,
    http::{Request, request::Parts},
    routing::post,
};
use futures::future::join_all;
use http_body_util::BodyExt;
use payonce::{
    charges,
    http::Keyless,
    idempotency::{Rules, Scenario},
    layer::{Idempotent, Tx},
};
use serde_json::json;
use sqlx::{Executor, PgPool, postgres::PgPoolOptions};
use tower::ServiceExt;

use crate::support::{Reply, Service, Settings, count, proxy::Proxy};

fn whose(parts: &Parts) -> Option<String> {
    Some(parts.headers.get("x-user")?.to_str().ok()?.to_owned())
}

fn layer(pool: &PgPool) -> Idempotent {
    Idempotent::new(pool.clone(), Scenario::Form.default_rule(), whose)
}

fn ask(path: &str, key: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path)
        .header("x-user", "ann")
        .header("idempotency-key", key)
        .header("content-type", "application/json")
        .body(body.into())
        .unwrap()
}

async fn send(router: &Router, request: Request<Body>) -> Reply {
    let response = router.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Reply {
        status: parts.status,
        headers: parts.headers,
        body: String::from_utf8_lossy(&body).into_owned(),
    }
}

async fn echo(body: String) -> String {
    body
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn numbers_beyond_a_double_are_told_apart(pool: PgPool) {
    let router = Router::new().route("/x", post(echo)).layer(layer(&pool));
    for (i, (one, other)) in [
        (
            r#"{"to": 1234567890123456789}"#,
            r#"{"to": 1234567890123456788}"#,
        ),
        (
            r#"{"to": [-9007199254740993]}"#,
            r#"{"to": [-9007199254740992]}"#,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("key_{i}");
        assert_eq!(send(&router, ask("/x", &key, one)).await.status, 200);
        let second = send(&router, ask("/x", &key, other)).await;
        second.assert_error(422, "idempotency_key_reused");
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn nested_routes_are_told_apart(pool: PgPool) {
    let inner = |what: &'static str| {
        Router::new()
            .route("/x", post(move || async move { what }))
            .layer(layer(&pool))
    };
    let router = Router::new()
        .nest("/refund", inner("refunded"))
        .nest("/charge", inner("charged"));
    assert_eq!(
        send(&router, ask("/charge/x", "key_1", "{}")).await.body,
        "charged"
    );
    let second = send(&router, ask("/refund/x", "key_1", "{}")).await;
    assert_eq!(second.status, 422, "{second:?}");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_time_limit_may_be_long(pool: PgPool) {
    for limit in [Duration::from_hours(24 * 30), Duration::MAX] {
        let router = Router::new()
            .route("/x", post(echo))
            .layer(layer(&pool).time_limit(limit));
        let reply = send(&router, ask("/x", &format!("k{}", limit.as_secs()), "{}")).await;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_services_own_settings_are_given_back(pool: PgPool) {
    let own = PgPoolOptions::new()
        .max_connections(2)
        .after_connect(|conn, _| {
            Box::pin(async move { conn.execute("set lock_timeout = '7s'").await.map(drop) })
        })
        .connect_with((*pool.connect_options()).clone())
        .await
        .unwrap();
    let handler = |mut tx: Tx| async move {
        sqlx::query_scalar::<_, String>(
            "select concat_ws(' ', current_setting('lock_timeout'), current_setting('statement_timeout'), current_setting('enable_seqscan'))",
        )
        .fetch_one(&mut *tx)
        .await
        .unwrap()
    };
    let router: Router = Router::new().route("/x", post(handler)).layer(layer(&own));
    let reply = send(&router, ask("/x", "key_1", "{}")).await;
    assert_eq!(reply.body, "7s 11s on");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_answer_may_be_deep(pool: PgPool) {
    let router = Router::new().route("/x", post(echo)).layer(layer(&pool));
    let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    let reply = send(&router, ask("/x", "key_1", deep)).await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn without_a_key_a_failed_transaction_is_no_success(pool: PgPool) {
    pool.execute("create table done (what text not null)")
        .await
        .unwrap();
    let handler = |mut tx: Tx| async move {
        tx.execute("insert into done values ('it')").await.unwrap();
        let _ = tx.execute("select 1 / 0").await;
        "all is well"
    };
    let router: Router = Router::new()
        .route("/x", post(handler))
        .layer(layer(&pool).key_optional());
    let mut request = ask("/x", "key_1", "{}");
    request.headers_mut().remove("idempotency-key");
    let reply = send(&router, request).await;
    let there = count(&pool, "done").await;
    assert_eq!((reply.status.as_u16(), there), (500, 0), "{reply:?}");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn sixty_four_duplicates_leave_room_for_the_handler(pool: PgPool) {
    pool.execute("create table done (what text not null)")
        .await
        .unwrap();
    for size in [2, 3] {
        let own = PgPoolOptions::new()
            .max_connections(size)
            .connect_with((*pool.connect_options()).clone())
            .await
            .unwrap();
        let handle = own.clone();
        let handler = move |mut tx: Tx| {
            let own = handle.clone();
            async move {
                tx.execute("insert into done values ('it')").await.unwrap();
                for _ in 0..5 {
                    own.execute("select 1").await.unwrap();
                }
                "done"
            }
        };
        let router: Router = Router::new().route("/x", post(handler)).layer(layer(&own));
        let replies =
            join_all((0..64).map(|_| send(&router, ask("/x", &format!("key_{size}"), "{}")))).await;
        assert!(replies.iter().all(|reply| reply.status == 200));
    }
}

fn short(ttl: Duration) -> Settings {
    Settings {
        answer_ttl: ttl,
        ..Settings::default()
    }
}

async fn charge(service: &Service, key: &str, capture: bool) -> Reply {
    service
        .post("/v1/charges", key)
        .json(&json!({"amount": 5000, "currency": "usd", "customer": "cus_1", "capture": capture}))
        .send()
        .await
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_refund_whose_commit_is_lost_and_whose_answer_expired(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let direct = Service::start_with(&pool, short(Duration::from_micros(1))).await;
    let service = direct.behind(&proxy);
    let id = charge(&service, "order_1", true).await.charge_id();
    proxy.lose_commits(1, true);
    let refund = service
        .post("/v1/refunds", "refund_1")
        .json(&json!({"charge": id, "amount": 100}))
        .send()
        .await;
    assert_eq!(count(&pool, "refunds").await, 1);
    assert_eq!(refund.status, 200);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_keyless_charge_whose_commit_is_lost_and_whose_key_expired(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let mut service = Service::start_with(
        &pool,
        Settings {
            keyless: Keyless::Fingerprint,
            ..Settings::default()
        },
    )
    .await
    .behind(&proxy);
    service.app.rules = Rules::with(&["keyless=1us".parse().unwrap()]).unwrap();
    let service = service.with_cold_callers();
    proxy.lose_commits(1, true);
    let reply = service
        .call("POST", "/v1/charges")
        .json(&json!({"amount": 5000, "currency": "usd"}))
        .send()
        .await;
    assert_eq!(service.count_charges().await, 1);
    assert_eq!(reply.status, 200);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn looking_a_key_up_does_not_refuse_it(pool: PgPool) {
    let service = Service::start(&pool).await;
    let other = service.replica_with(Settings {
        pool_size: 8,
        ..Settings::default()
    });
    let mut refused = 0;
    for i in 0..150 {
        let key = format!("key_{i}");
        let path = format!("/v1/idempotency_keys/{key}");
        let looks = join_all((0..8).map(|_| other.get(&path).send()));
        let (_, reply) = futures::future::join(
            looks,
            service.charge(&key).header("prefer", "wait=0").send(),
        )
        .await;
        if reply.status != 200 {
            refused += 1;
        }
    }
    assert_eq!(refused, 0, "409 in flight though nobody was at it");
}

/// Updates, refunds and a capture of one charge in one batch.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn many_changes_of_one_charge_in_one_batch(pool: PgPool) {
    let service = Service::start(&pool).await;
    let id = charge(&service, "order_1", false).await.charge_id();
    // Both writing tasks run into it; the rest gathers.
    let blocker = pool
        .begin_with("begin; lock table idempotency_keys in share mode")
        .await
        .unwrap();
    let fillers: Vec<_> = (0..2)
        .map(|i| {
            let call = service.charge(&format!("filler_{i}"));
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(i * 30)).await;
                call.send().await
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(80)).await;
    let mut calls = vec![
        service
            .post(&format!("/v1/charges/{id}/capture"), "c")
            .json(&json!({"amount": 4000})),
    ];
    for i in 0..20 {
        calls.push(
            service
                .post("/v1/refunds", &format!("r{i}"))
                .json(&json!({"charge": id, "amount": 300})),
        );
        calls.push(
            service
                .post(&format!("/v1/charges/{id}"), &format!("u{i}"))
                .json(&json!({"metadata": {format!("n{i}"): "v"}})),
        );
    }
    let calls = calls
        .into_iter()
        .map(|call| tokio::spawn(call.send()))
        .collect::<Vec<_>>();
    tokio::time::sleep(Duration::from_millis(100)).await;
    blocker.rollback().await.unwrap();
    let mut made = 0;
    let mut captured = false;
    for (i, call) in calls.into_iter().enumerate() {
        let reply = call.await.unwrap();
        if i == 0 {
            captured = reply.status == 200;
            continue;
        }
        if i % 2 == 1 {
            made += i64::from(reply.status == 200);
        } else {
            assert_eq!(reply.status, 200, "{reply:?}");
        }
    }
    for filler in fillers {
        assert_eq!(filler.await.unwrap().status, 200);
    }
    assert!(captured);
    let now = service
        .get(&format!("/v1/charges/{id}"))
        .send()
        .await
        .value();
    assert_eq!(now["amount_refunded"], made * 300);
    assert!(made <= 13);
    assert_eq!(now["metadata"].as_object().unwrap().len(), 20);
    assert_eq!(count(&pool, "refunds").await, made);
}

/// A charge that another transaction holds keeps nobody else waiting.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_held_charge_is_passed_over_and_its_changes_come_back(pool: PgPool) {
    let service = Service::start(&pool).await;
    let held = charge(&service, "held", true).await.charge_id();
    let free = charge(&service, "free", true).await.charge_id();
    let mut holder = pool.begin_with("begin").await.unwrap();
    holder
        .execute("select from charges where idempotency_key = 'held' for update")
        .await
        .unwrap();
    let ids = [&held, &free].map(|id| (service.account_id, id.parse().unwrap()));
    let mut other = pool
        .begin_with("begin; set local lock_timeout = '5min'")
        .await
        .unwrap();
    let ids = ids.into_iter().collect();
    let locked = tokio::time::timeout(Duration::from_mins(1), charges::lock(&mut other, &ids))
        .await
        .expect("it waits")
        .unwrap();
    assert_eq!(locked.len(), 1);
    other.rollback().await.unwrap();

    let refund = |key: &str, id: &str, wait: &str| {
        let call = service.post("/v1/refunds", key).header("prefer", wait);
        call.json(&json!({"charge": id, "amount": 1})).send()
    };
    refund("refund_1", &held, "wait=0")
        .await
        .assert_error(409, "idempotency_key_in_use");
    let patient = tokio::spawn(refund("refund_2", &held, "wait=10"));
    assert_eq!(refund("refund_3", &free, "wait=0").await.status, 200);
    holder.rollback().await.unwrap();
    assert_eq!(patient.await.unwrap().status, 200);
    assert_eq!(refund("refund_1", &held, "wait=2").await.status, 200);
    assert_eq!(count(&pool, "refunds").await, 3);
}
