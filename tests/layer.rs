//! The layer keeps the promises of the service for handlers of anybody.

use std::{
    collections::HashSet,
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Extension, Router,
    body::{Body, Bytes},
    handler::Handler,
    http::{Method, Request, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use futures::{FutureExt, future::join_all, stream};
use http_body_util::BodyExt;
use payonce::{
    idempotency::{self, Duplicate, Fingerprint, Key, Rule, Scenario, Scope, purge, store::NewRow},
    ids::{AccountId, RequestId},
    layer::{Completion, Idempotent, Tx},
};
use sha2::{Digest, Sha256};
use sqlx::{Connection, Executor, PgPool, postgres::PgPoolOptions};
use tower::ServiceExt;

use crate::support::{
    Reply, count, eventually,
    proxy::{Network, Proxy},
    somebody_is_blocked,
};

#[path = "../examples/shop.rs"]
#[expect(dead_code, reason = "its main is another program's")]
mod shop;

/// A small pool of its own on the same database, as a replica has it.
async fn replica(pool: &PgPool) -> PgPool {
    PgPoolOptions::new()
        .max_connections(3)
        .connect_with((*pool.connect_options()).clone())
        .await
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

fn request(path: &str, user: &str, key: &str, body: &str) -> Request<Body> {
    Request::post(path)
        .header("x-user", user)
        .header("idempotency-key", key)
        .header("content-type", "application/json")
        .body(body.to_owned().into())
        .unwrap()
}

const TEAPOT: &str = r#"{"item": "teapot", "quantity": 2}"#;

async fn pieces(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select pieces from stock where item = 'teapot'")
        .fetch_one(pool)
        .await
        .unwrap()
}

fn whose(parts: &Parts) -> Option<String> {
    Some(parts.headers.get("x-user")?.to_str().ok()?.to_owned())
}

fn layer(pool: &PgPool) -> Idempotent {
    Idempotent::new(pool.clone(), Scenario::Form.default_rule(), whose)
}

/// A service with one handler, that notes in a table of its own what it does.
async fn service<H, T>(pool: &PgPool, layer: Idempotent, handler: H) -> Router
where
    H: Handler<T, PgPool>,
    T: 'static,
{
    pool.execute("create table if not exists done (what text not null)")
        .await
        .unwrap();
    Router::new()
        .route("/x", post(handler))
        .layer(layer)
        .with_state(pool.clone())
}

async fn work(tx: &mut Tx) {
    tx.execute("insert into done values ('it')").await.unwrap();
}

fn ask(key: &str) -> Request<Body> {
    request("/x", "ann", key, "{}")
}

#[sqlx::test(migrations = false)]
async fn sixty_four_orders_on_two_replicas_are_one(pool: PgPool) {
    shop::set_up(&pool).await.unwrap();
    let replicas = [
        shop::router(replica(&pool).await),
        shop::router(replica(&pool).await),
    ];
    for round in 1..=5 {
        let key = format!("cart_{round}");
        let replies = join_all((0..64).map(|i| {
            let request = request("/orders", "ann", &key, TEAPOT);
            send(&replicas[i % 2], request)
        }))
        .await;
        let bodies: HashSet<_> = replies.iter().map(|r| (r.status, &r.body)).collect();
        assert_eq!(bodies.len(), 1, "{bodies:?}");
        assert_eq!(replies[0].status, 201);
        assert!(
            replies
                .iter()
                .all(|r| r.headers["location"] == replies[0].headers["location"])
        );
        assert_eq!(replies.iter().filter(|r| !r.is_replayed()).count(), 1);
        assert_eq!(count(&pool, "orders").await, round);
        assert_eq!(pieces(&pool).await, 100 - 2 * round);
    }
}

#[sqlx::test(migrations = false)]
async fn a_key_belongs_to_a_request_and_to_a_caller(pool: PgPool) {
    shop::set_up(&pool).await.unwrap();
    let shop = shop::router(pool.clone());
    let first = send(&shop, request("/orders", "ann", "cart_1", TEAPOT)).await;
    assert_eq!(first.status, 201);
    // Written otherwise, it is the same.
    let retry = request(
        "/orders",
        "ann",
        "\"cart_1\"",
        "{ \"quantity\":2,\"item\":\"teapot\"}",
    );
    let retry = send(&shop, retry).await;
    assert_eq!((retry.status, &retry.body), (first.status, &first.body));
    assert!(retry.is_replayed());

    let other = r#"{"item": "teapot", "quantity": 3}"#;
    send(&shop, request("/orders", "ann", "cart_1", other))
        .await
        .assert_error(422, "idempotency_key_reused");
    send(&shop, request("/orders?gift=1", "ann", "cart_1", TEAPOT))
        .await
        .assert_error(422, "idempotency_key_reused");
    let bob = send(&shop, request("/orders", "bob", "cart_1", TEAPOT)).await;
    assert_eq!(bob.status, 201);
    assert_ne!(bob.body, first.body);
    assert_eq!(count(&pool, "orders").await, 2);

    // A refusal of the shop's is an outcome like any other.
    let too_many = r#"{"item": "teapot", "quantity": 1000}"#;
    for replayed in [false, true] {
        let reply = send(&shop, request("/orders", "ann", "cart_2", too_many)).await;
        assert_eq!(
            (reply.status.as_u16(), reply.is_replayed()),
            (409, replayed)
        );
        assert_eq!(reply.body, "so many are not there");
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_body_that_breaks_off_or_never_ends_is_refused(pool: PgPool) {
    let layer = layer(&pool).time_limit(Duration::from_millis(300));
    let service = service(&pool, layer, || async {}).await;
    let broken = [Ok(Bytes::from("{")), Err(std::io::Error::other("broken"))];
    for (body, status, code) in [
        (
            Body::from_stream(stream::iter(broken)),
            400,
            "parameter_unreadable",
        ),
        (
            Body::from_stream(stream::pending::<Result<Bytes, Infallible>>()),
            503,
            "unavailable",
        ),
    ] {
        let mut request = ask("key_1");
        *request.body_mut() = body;
        send(&service, request).await.assert_error(status, code);
    }
    assert_eq!(count(&pool, "idempotency_keys").await, 0);
}

#[sqlx::test(migrations = false)]
async fn what_is_no_request_with_a_key_is_refused_or_passed(pool: PgPool) {
    shop::set_up(&pool).await.unwrap();
    let shop = shop::router(pool.clone());
    let without = |name: &str| {
        let mut request = request("/orders", "ann", "cart_1", TEAPOT);
        request.headers_mut().remove(name);
        request
    };
    send(&shop, without("idempotency-key"))
        .await
        .assert_error(400, "idempotency_key_missing");
    send(&shop, without("x-user"))
        .await
        .assert_error(401, "api_key_invalid");
    let mut twice = without("nothing");
    twice
        .headers_mut()
        .append("idempotency-key", "other".parse().unwrap());
    send(&shop, twice)
        .await
        .assert_error(400, "idempotency_key_invalid");
    let large = "x".repeat((1 << 20) + 1);
    send(&shop, request("/orders", "ann", "cart_1", &large))
        .await
        .assert_error(413, "body_too_large");
    assert_eq!(count(&pool, "idempotency_keys").await, 0);
    let stock = Request::get("/stock").body(Body::empty()).unwrap();
    assert_eq!(send(&shop, stock).await.status, 200);
    let page = Request::get("/errors/body_too_large")
        .body(Body::empty())
        .unwrap();
    assert_eq!(send(&shop, page).await.status, 200);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_client_that_hangs_up_changes_nothing(pool: PgPool) {
    let handler = |mut tx: Tx| async move {
        work(&mut tx).await;
        "done"
    };
    let service = service(&pool, layer(&pool), handler).await;
    let blocker = pool
        .begin_with("begin; lock table done in share mode")
        .await
        .unwrap();
    let router = service.clone();
    let request = tokio::spawn(async move { send(&router, ask("key_1")).await });
    somebody_is_blocked(&pool).await;
    request.abort();
    assert!(request.await.unwrap_err().is_cancelled());
    blocker.rollback().await.unwrap();
    eventually("it is done", || async { count(&pool, "done").await == 1 }).await;
    let retry = send(&service, ask("key_1")).await;
    assert_eq!((retry.status.as_u16(), retry.is_replayed()), (200, true));
    assert_eq!(count(&pool, "done").await, 1);
}

/// A handler that is at fault the first time: nothing is there afterwards, and
/// the same key works.
async fn a_fault_burns_no_key<F>(pool: &PgPool, layer: Idempotent, fault: fn(Tx) -> F, status: u16)
where
    F: Future<Output = Response> + Send + 'static,
{
    let times = Arc::new(AtomicUsize::new(0));
    let handler = move |mut tx: Tx| {
        let first = times.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            work(&mut tx).await;
            if first {
                return fault(tx).await;
            }
            "done".into_response()
        }
    };
    let service = service(pool, layer, handler).await;
    let failed = send(&service, ask("key_1")).await;
    assert_eq!(failed.status, status, "{failed:?}");
    eventually("nothing is left of it", || async {
        count(pool, "done").await == 0 && count(pool, "idempotency_keys").await == 0
    })
    .await;
    let retry = send(&service, ask("key_1")).await;
    assert_eq!(
        (retry.status.as_u16(), retry.is_replayed()),
        (200, false),
        "{retry:?}"
    );
    assert!(send(&service, ask("key_1")).await.is_replayed());
    assert_eq!(count(pool, "done").await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_panic_burns_no_key(pool: PgPool) {
    a_fault_burns_no_key(&pool, layer(&pool), |_| async { panic!("on purpose") }, 500).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_answer_that_is_a_fault_burns_no_key(pool: PgPool) {
    let fault = |_| async { StatusCode::BAD_GATEWAY.into_response() };
    a_fault_burns_no_key(&pool, layer(&pool), fault, 502).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_service_says_which_answers_are_outcomes(pool: PgPool) {
    let fault = |_| async { StatusCode::BAD_REQUEST.into_response() };
    let layer = layer(&pool).completes(|status| {
        if status.is_success() {
            Completion::Commit
        } else {
            Completion::RollBack
        }
    });
    a_fault_burns_no_key(&pool, layer, fault, 400).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_answer_that_is_too_large_burns_no_key(pool: PgPool) {
    let fault = |_| async { "x".repeat(101).into_response() };
    let layer = layer(&pool).size_limits(1000, 100);
    a_fault_burns_no_key(&pool, layer, fault, 500).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_answer_that_breaks_off_burns_no_key(pool: PgPool) {
    let fault = |_| async {
        let parts = [
            Ok(Bytes::from("begun")),
            Err(std::io::Error::other("broken")),
        ];
        Body::from_stream(stream::iter(parts)).into_response()
    };
    a_fault_burns_no_key(&pool, layer(&pool), fault, 500).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_answer_that_never_ends_burns_no_key(pool: PgPool) {
    let fault = |_| async {
        Body::from_stream(stream::pending::<Result<Bytes, Infallible>>()).into_response()
    };
    let layer = layer(&pool).time_limit(Duration::from_secs(1));
    a_fault_burns_no_key(&pool, layer, fault, 503).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_handler_that_takes_too_long_burns_no_key(pool: PgPool) {
    let fault = |mut tx: Tx| async move {
        tx.execute("select pg_sleep(60)").await.unwrap();
        StatusCode::OK.into_response()
    };
    let layer = layer(&pool).time_limit(Duration::from_secs(1));
    a_fault_burns_no_key(&pool, layer, fault, 503).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_transaction_that_is_kept_burns_no_key(pool: PgPool) {
    let fault = |tx: Tx| async move {
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            drop(tx);
        });
        StatusCode::OK.into_response()
    };
    a_fault_burns_no_key(&pool, layer(&pool), fault, 500).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_statement_that_failed_unseen_burns_no_key(pool: PgPool) {
    let fault = |mut tx: Tx| async move {
        let _ = tx.execute("select 1 / 0").await;
        "all is well".into_response()
    };
    a_fault_burns_no_key(&pool, layer(&pool), fault, 500).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_transaction_that_is_ended_by_hand_burns_no_key(pool: PgPool) {
    let fault = |mut tx: Tx| async move {
        tx.execute("rollback").await.unwrap();
        "all is well".into_response()
    };
    a_fault_burns_no_key(&pool, layer(&pool), fault, 500).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_handler_without_a_transaction_is_replayed_too(pool: PgPool) {
    let times = Arc::new(AtomicUsize::new(0));
    let handler = move || {
        let time = times.fetch_add(1, Ordering::SeqCst);
        async move { format!("time {time}") }
    };
    let service = service(&pool, layer(&pool), handler).await;
    for replayed in [false, true] {
        let reply = send(&service, ask("key_1")).await;
        assert_eq!(
            (reply.body.as_str(), reply.is_replayed()),
            ("time 0", replayed)
        );
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_transaction_that_is_not_there_is_a_bug_that_says_so(pool: PgPool) {
    let twice = |one: Tx, other: Tx| async move { drop((one, other)) };
    let service = service(&pool, layer(&pool), twice).await;
    send(&service, ask("key_1"))
        .await
        .assert_error(500, "internal");
    let uncovered = Router::new().route("/x", get(|_: Tx| async {}).layer(layer(&pool)));
    let request = Request::get("/x").body(Body::empty()).unwrap();
    send(&uncovered, request)
        .await
        .assert_error(500, "internal");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn answers_are_replayed_byte_for_byte(pool: PgPool) {
    let bodies: &[(&str, &[u8])] = &[
        (
            "application/json",
            b" {\"b\": 1,\n \"a\": 2, \"a\": 3.50 } ",
        ),
        ("application/json", b"not json"),
        ("application/octet-stream", &[0, 255, 13, 10, 0]),
        ("text/plain", "schön".as_bytes()),
        ("text/plain", b""),
        ("text/plain", b"\"a string\""),
    ];
    for (i, &(content_type, body)) in bodies.iter().enumerate() {
        let handler = move || async move {
            let headers = [
                ("content-type", content_type),
                ("location", "/here"),
                ("x-trace", "once"),
            ];
            let chunks = body
                .chunks(2)
                .map(|chunk| Ok::<_, Infallible>(Bytes::from(chunk)));
            (
                StatusCode::ACCEPTED,
                headers,
                Body::from_stream(stream::iter(chunks)),
            )
        };
        let service = service(&pool, layer(&pool), handler).await;
        for replayed in [false, true] {
            let response = service
                .clone()
                .oneshot(ask(&format!("key_{i}")))
                .await
                .unwrap();
            let (parts, got) = response.into_parts();
            assert_eq!(parts.status, 202);
            assert_eq!(got.collect().await.unwrap().to_bytes(), body);
            assert_eq!(parts.headers["content-type"], content_type);
            assert_eq!(parts.headers["location"], "/here");
            // What is not on the list is of the first answer alone.
            assert_eq!(parts.headers.contains_key("x-trace"), !replayed);
            assert_eq!(parts.headers.contains_key("idempotent-replayed"), replayed);
        }
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_rule_says_for_how_long_and_what_a_duplicate_gets(pool: PgPool) {
    let handler = |mut tx: Tx| async move {
        work(&mut tx).await;
        (StatusCode::CREATED, "done")
    };
    for (duplicate, status, body) in [
        (Duplicate::Replay, 201, "done"),
        (Duplicate::Skip, 200, ""),
        (Duplicate::Refuse, 409, "duplicate_request"),
    ] {
        sqlx::raw_sql("drop table if exists done; delete from idempotency_keys")
            .execute(&pool)
            .await
            .unwrap();
        let keep = Duration::from_mins(7);
        let layer = Idempotent::new(pool.clone(), Rule { keep, duplicate }, whose);
        let service = service(&pool, layer, handler).await;
        let first = send(&service, ask("key_1")).await;
        assert_eq!(first.status, 201);
        let second = send(&service, ask("key_1")).await;
        assert_eq!(second.status, status);
        assert!(second.body.contains(body), "{second:?}");
        if duplicate == Duplicate::Refuse {
            let original = second.value()["original_request_id"].clone();
            assert_eq!(original, first.headers["request-id"].to_str().unwrap());
        }
        let kept: f64 = sqlx::query_scalar(
            "select extract(epoch from expires_at - created_at)::float8 from idempotency_keys",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        // From the answer on, which comes a moment after the claim.
        assert!((420.0..430.0).contains(&kept), "kept for {kept} s");

        // Its time is over: it is a new request, whether it is purged or not.
        for done in [2, 3] {
            sqlx::query("update idempotency_keys set expires_at = statement_timestamp()")
                .execute(&pool)
                .await
                .unwrap();
            if done == 3 {
                purge::run_until_done(&pool).await.unwrap();
            }
            let later = send(&service, ask("key_1")).await;
            assert_eq!((later.status.as_u16(), later.is_replayed()), (201, false));
            assert_eq!(count(&pool, "done").await, done);
        }
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_key_in_flight_is_waited_for_and_then_409(pool: PgPool) {
    let handler = |mut tx: Tx| async move {
        work(&mut tx).await;
        "done"
    };
    let layer = layer(&pool).wait(Duration::from_millis(400));
    let service = service(&pool, layer, handler).await;
    let blocker = pool
        .begin_with("begin; lock table done in share mode")
        .await
        .unwrap();
    let router = service.clone();
    let first = tokio::spawn(async move { send(&router, ask("key_1")).await });
    somebody_is_blocked(&pool).await;
    send(&service, ask("key_1"))
        .await
        .assert_error(409, "idempotency_key_in_use");
    let router = service.clone();
    let patient = tokio::spawn(async move { send(&router, ask("key_1")).await });
    blocker.rollback().await.unwrap();
    assert_eq!(first.await.unwrap().body, "done");
    assert!(patient.await.unwrap().is_replayed());
    assert_eq!(count(&pool, "done").await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_key_may_be_optional(pool: PgPool) {
    let handler = |mut tx: Tx| async move {
        work(&mut tx).await;
        StatusCode::NO_CONTENT
    };
    let service = service(&pool, layer(&pool).key_optional(), handler).await;
    for done in [1, 2] {
        let request = Request::post("/x")
            .header("x-user", "ann")
            .body(Body::empty())
            .unwrap();
        assert_eq!(send(&service, request).await.status, 204);
        assert_eq!(count(&pool, "done").await, done);
    }
    assert_eq!(count(&pool, "idempotency_keys").await, 0);
    for _ in 0..2 {
        assert_eq!(send(&service, ask("key_1")).await.status, 204);
    }
    assert_eq!(count(&pool, "done").await, 3);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn methods_and_what_counts_can_be_chosen(pool: PgPool) {
    let layer = layer(&pool)
        .methods([Method::DELETE])
        .headers([header::ETAG])
        .fingerprint(|_, body| body.first().copied().into_iter().collect());
    let times = Arc::new(AtomicUsize::new(0));
    let handler = move || {
        let time = times.fetch_add(1, Ordering::SeqCst);
        async move { [(header::ETAG, time.to_string())] }
    };
    let router: Router = Router::new()
        .route("/x", post(handler.clone()).delete(handler))
        .layer(layer);
    let ask = |method: Method, body: &str| {
        let mut request = request("/x", "ann", "key_1", body);
        *request.method_mut() = method;
        send(&router, request)
    };
    for (method, body, status, time) in [
        (Method::POST, "{}", 200, "0"),
        (Method::POST, "{}", 200, "1"),
        (Method::DELETE, "{}", 200, "2"),
        (Method::DELETE, "{ also }", 200, "2"),
        (Method::DELETE, "[]", 422, ""),
    ] {
        let reply = ask(method.clone(), body).await;
        assert_eq!(reply.status, status, "{method} {body}");
        if status == 200 {
            assert_eq!(reply.headers["etag"], time, "{method} {body}");
        }
    }
}

/// Says in a table of its own that it was written to the pool, by itself.
async fn write_alone(pool: &PgPool) {
    pool.execute("insert into done values ('alone')")
        .await
        .unwrap();
}

/// Pools as the services of others have them, of one connection that goes
/// through a proxy.
async fn one_connection(pool: &PgPool, proxy: &Proxy) -> PgPool {
    PgPoolOptions::new()
        .max_connections(1)
        // The ping would be what the network swallows, and not what comes next.
        .test_before_acquire(false)
        .connect_with(proxy.options(&pool.connect_options()))
        .await
        .unwrap()
}

/// sqlx 0.9.0 gives such a connection back with its transaction open, and what is
/// written to it later is acknowledged and gone.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_begin_that_is_given_up_leaves_the_pool_as_it_was(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let hosts = one_connection(&pool, &proxy).await;
    let layer = layer(&hosts)
        .wait(Duration::ZERO)
        .step_limit(Duration::from_millis(200));
    let service = service(&pool, layer, || async {}).await;
    proxy.set(Network::Silent);
    send(&service, ask("key_1"))
        .await
        .assert_error(503, "unavailable");
    proxy.set(Network::Well);
    write_alone(&hosts).await;
    assert_eq!(count(&pool, "done").await, 1, "it was acknowledged");
    assert_eq!(send(&service, ask("key_1")).await.status, 200);
}

/// The same wherever the time is over while a transaction is open.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_answer_that_is_not_stored_in_time_leaves_the_pool_as_it_was(pool: PgPool) {
    let proxy = Arc::new(Proxy::to(&pool).await);
    let hosts = one_connection(&pool, &proxy).await;
    for (path, status) in [("commit", 200), ("alone", 400), ("back", 500)] {
        let network = Arc::clone(&proxy);
        let fails = Arc::new(AtomicUsize::new(1));
        let handler = move |mut tx: Tx| {
            let fails = fails.swap(0, Ordering::SeqCst) == 1;
            if fails {
                network.set(Network::Silent);
            }
            let network = Arc::clone(&network);
            async move {
                // Flushed with what comes next.
                let _ = tx.execute("insert into done values ('it')").now_or_never();
                drop((tx, network));
                StatusCode::from_u16(status).unwrap()
            }
        };
        let layer = layer(&hosts).step_limit(Duration::from_millis(200));
        let service = service(&pool, layer, handler).await;
        let ask = || ask(path);
        send(&service, ask()).await.assert_error(503, "unavailable");
        proxy.set(Network::Well);
        write_alone(&hosts).await;
        let alone: i64 = sqlx::query_scalar("select count(*) from done where what = 'alone'")
            .fetch_one(&pool)
            .await
            .unwrap();
        assert_eq!(alone, 1, "{path}: it was acknowledged");
        assert_eq!(send(&service, ask()).await.status, status, "{path}");
        pool.execute("delete from done").await.unwrap();
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_commit_whose_answer_is_lost_is_found_by_the_retry(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let hosts = one_connection(&pool, &proxy).await;
    let handler = |mut tx: Tx| async move {
        work(&mut tx).await;
        "done"
    };
    let service = service(&pool, layer(&hosts), handler).await;
    for (key, committed) in [("key_1", true), ("key_2", false)] {
        pool.execute("delete from done").await.unwrap();
        proxy.lose_commits(1, committed);
        send(&service, ask(key))
            .await
            .assert_error(503, "unavailable");
        assert_eq!(proxy.commits_to_lose(), 0);
        let retry = send(&service, ask(key)).await;
        assert_eq!(retry.status, 200);
        // Cut at once, the server may have done it or not.
        assert!(retry.is_replayed() || !committed);
        assert_eq!(count(&pool, "done").await, 1);
    }
}

/// COMMIT can wait for a standby for hours, and its session with it, whatever the
/// client does. Another connection for each would use up the server's.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_commit_that_is_given_up_goes_on_and_keeps_its_place(pool: PgPool) {
    let hosts = PgPoolOptions::new()
        .max_connections(1)
        .connect_with((*pool.connect_options()).clone())
        .await
        .unwrap();
    let handler = |mut tx: Tx| async move {
        work(&mut tx).await;
        "done"
    };
    let layer = layer(&hosts)
        .wait(Duration::from_secs(30))
        .step_limit(Duration::from_millis(200));
    let service = service(&pool, layer, handler).await;
    sqlx::raw_sql(
        "create function wait() returns trigger language plpgsql as
            $$ begin perform pg_advisory_xact_lock(1); return null; end $$;
        create constraint trigger wait after insert on done deferrable initially deferred
            for each row execute function wait()",
    )
    .execute(&pool)
    .await
    .unwrap();
    let holder = pool
        .begin_with("begin; select pg_advisory_xact_lock(1)")
        .await
        .unwrap();
    send(&service, ask("key_1"))
        .await
        .assert_error(503, "unavailable");
    somebody_is_blocked(&pool).await;
    assert!(hosts.try_acquire().is_none());
    assert_eq!(hosts.size(), 1);
    holder.rollback().await.unwrap();
    let retry = send(&service, ask("key_1")).await;
    assert_eq!((retry.status.as_u16(), retry.is_replayed()), (200, true));
    assert_eq!(count(&pool, "done").await, 1);
    assert_eq!(hosts.size(), 1);
}

/// sqlx rolls the outer transaction back with it, and what is written next would
/// be committed by itself.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_nested_begin_that_is_cancelled_or_fails_burns_no_key(pool: PgPool) {
    let proxy = Arc::new(Proxy::to(&pool).await);
    let hosts = one_connection(&pool, &proxy).await;
    let network = Arc::clone(&proxy);
    let handler = move |headers: axum::http::HeaderMap, mut tx: Tx| {
        let network = Arc::clone(&network);
        async move {
            work(&mut tx).await;
            match headers["x-fault"].to_str().unwrap() {
                "cancelled" => {
                    network.set(Network::Silent);
                    assert!(tx.begin().now_or_never().is_none());
                    network.set(Network::Well);
                    work(&mut tx).await;
                }
                "cancelled, and seen by nobody" => {
                    network.set(Network::Silent);
                    assert!(tx.begin().now_or_never().is_none());
                    network.set(Network::Well);
                }
                "failed" => {
                    let _ = tx.execute("select 1 / 0").await;
                    assert!(tx.begin().await.is_err());
                    work(&mut tx).await;
                }
                "left open" => std::mem::forget(tx.begin().await.unwrap()),
                "none" => {
                    let mut nested = tx.begin().await.unwrap();
                    nested
                        .execute("insert into done values ('that')")
                        .await
                        .unwrap();
                    nested.commit().await.unwrap();
                    drop(tx.begin().await.unwrap());
                }
                other => panic!("{other}"),
            }
            "all is well"
        }
    };
    let service = service(&pool, layer(&hosts), handler).await;
    let ask = |fault: &'static str| {
        let mut request = ask("key_1");
        request
            .headers_mut()
            .insert("x-fault", fault.parse().unwrap());
        request
    };
    for fault in [
        "cancelled",
        "cancelled, and seen by nobody",
        "failed",
        "left open",
    ] {
        let reply = send(&service, ask(fault)).await;
        assert_eq!((reply.status.as_u16(), fault), (500, fault));
        assert_eq!(count(&pool, "done").await, 0, "{fault}");
        write_alone(&hosts).await;
        assert_eq!(
            count(&pool, "done").await,
            1,
            "{fault}: it was acknowledged"
        );
        pool.execute("delete from done").await.unwrap();
    }
    assert_eq!(send(&service, ask("none")).await.body, "all is well");
    assert!(send(&service, ask("none")).await.is_replayed());
    assert_eq!(count(&pool, "done").await, 2);
}

/// Without a key nothing is stored that could be missing.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_transaction_without_a_key_that_is_ended_by_hand_is_not_acknowledged(pool: PgPool) {
    for (i, ends) in ["rollback", "rollback; begin", "select 1 / 0"]
        .into_iter()
        .enumerate()
    {
        let handler = move |mut tx: Tx| async move {
            work(&mut tx).await;
            let _ = tx.execute(ends).await;
            "all is well"
        };
        let service = service(&pool, layer(&pool).key_optional(), handler).await;
        let mut request = ask("key_1");
        request.headers_mut().remove("idempotency-key");
        let reply = send(&service, request).await;
        assert_eq!(reply.status, 500, "{ends}");
        assert_eq!(count(&pool, "done").await, 0, "{i}");
    }
}

/// A role that may nothing with the table of keys, a schema that has none or
/// another one, and rows that only their tenant may see.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_handler_may_set_role_and_search_path(pool: PgPool) {
    sqlx::raw_sql(
        "create schema tenant;
        create table tenant.orders (tenant text default current_setting('app.tenant'), what text, role text default current_user);
        create table tenant.idempotency_keys (like idempotency_keys including all);
        alter table tenant.orders enable row level security;
        alter table tenant.orders force row level security;
        create policy own on tenant.orders using (tenant = current_setting('app.tenant'));
        grant usage on schema tenant to pg_read_all_stats;
        grant select, insert on tenant.orders to pg_read_all_stats;
        -- Deferred, it runs with what is in force at COMMIT.
        create function tenant.at_commit() returns trigger language plpgsql as
            $$ begin
                if current_setting('search_path') <> new.what then raise exception 'another search_path'; end if;
                return null;
            end $$;
        create constraint trigger at_commit after insert on tenant.orders deferrable initially deferred
            for each row execute function tenant.at_commit();",
    )
    .execute(&pool)
    .await
    .unwrap();
    let path: String = sqlx::query_scalar("select current_setting('search_path')")
        .fetch_one(&pool)
        .await
        .unwrap();
    for (i, (sets, role, search_path)) in [
        (
            "set local role pg_read_all_stats",
            "pg_read_all_stats",
            &*path,
        ),
        ("set local search_path to tenant", "", "tenant"),
        (
            "set local search_path to tenant; set local role pg_read_all_stats",
            "pg_read_all_stats",
            "tenant",
        ),
        // Not local: it is undone by a rollback alone, and so by none of ours.
        ("set local row_security to off", "", &*path),
        (
            "set local session authorization pg_read_all_stats",
            "pg_read_all_stats",
            &*path,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        for refused in [false, true] {
            let handler = move |mut tx: Tx| async move {
                tx.execute("set local app.tenant = 'acme'").await.unwrap();
                sqlx::raw_sql(sets).execute(&mut *tx).await.unwrap();
                tx.execute(
                    "insert into tenant.orders (what) values (current_setting('search_path'))",
                )
                .await
                .unwrap();
                if refused {
                    return (StatusCode::CONFLICT, "refused");
                }
                (StatusCode::CREATED, "done")
            };
            let hosts = replica(&pool).await;
            let service = service(&pool, layer(&hosts), handler).await;
            let key = format!("key_{i}_{refused}");
            for replayed in [false, true] {
                let reply = send(&service, ask(&key)).await;
                let expected = if refused { 409 } else { 201 };
                assert_eq!(
                    (reply.status.as_u16(), reply.is_replayed()),
                    (expected, replayed),
                    "{sets}: {reply:?}"
                );
            }
            let orders: Vec<(String, String, String)> =
                sqlx::query_as("delete from tenant.orders returning tenant, what, role")
                    .fetch_all(&pool)
                    .await
                    .unwrap();
            if refused {
                assert_eq!(orders, [], "{sets}");
            } else {
                assert_eq!(orders.len(), 1, "{sets}");
                assert_eq!(orders[0].0, "acme");
                assert_eq!(orders[0].1, search_path, "{sets}");
                assert!(role.is_empty() || orders[0].2 == role, "{sets}");
            }
            // What comes next on the connection has what the pool's session has.
            let next: (String, String) =
                sqlx::query_as("select current_setting('role'), current_setting('search_path')")
                    .fetch_one(&hosts)
                    .await
                    .unwrap();
            assert_eq!(next, ("none".to_owned(), path.clone()), "{sets}");
        }
    }
    assert_eq!(count(&pool, "tenant.idempotency_keys").await, 0);
}

/// What was in force at the claim is what the pool made of its sessions, and not
/// the server's default.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_answer_is_stored_as_the_pools_session_would(pool: PgPool) {
    sqlx::raw_sql(
        "create schema keys;
        alter table idempotency_keys set schema keys;
        grant usage on schema keys to pg_read_all_stats;
        grant select, insert, update on keys.idempotency_keys to pg_read_all_stats;
        create function keys.who() returns trigger language plpgsql as
            $$ begin
                if current_user <> 'pg_read_all_stats' then raise exception '%', current_user; end if;
                return new;
            end $$;
        create trigger who before insert or update on keys.idempotency_keys
            for each row execute function keys.who()",
    )
    .execute(&pool)
    .await
    .unwrap();
    let hosts = PgPoolOptions::new()
        .max_connections(1)
        .after_connect(|conn, _| {
            Box::pin(async move {
                let both = "set role pg_read_all_stats; set search_path to keys";
                sqlx::raw_sql(both).execute(conn).await.map(drop)
            })
        })
        .connect_with((*pool.connect_options()).clone())
        .await
        .unwrap();
    let handler = |mut tx: Tx| async move {
        let both = "set local role none; set local search_path to public";
        sqlx::raw_sql(both).execute(&mut *tx).await.unwrap();
        work(&mut tx).await;
        "done"
    };
    let service = service(&pool, layer(&hosts), handler).await;
    for replayed in [false, true] {
        let reply = send(&service, ask("key_1")).await;
        assert_eq!(
            (reply.body.as_str(), reply.is_replayed()),
            ("done", replayed)
        );
    }
    assert_eq!(count(&pool, "done").await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_answer_completes_by_its_status(pool: PgPool) {
    let handler = |headers: axum::http::HeaderMap, mut tx: Tx| async move {
        work(&mut tx).await;
        let status = headers["x-status"].to_str().unwrap().parse().unwrap();
        StatusCode::from_u16(status).unwrap()
    };
    let service = service(&pool, layer(&pool), handler).await;
    let ask = |key: &str, status: u16| {
        let mut request = ask(key);
        request.headers_mut().insert("x-status", status.into());
        request
    };
    for (status, stored, written) in [
        (200, true, 1),
        (201, true, 1),
        (303, true, 1),
        (400, true, 0),
        (402, true, 0),
        (403, true, 0),
        (404, true, 0),
        (409, true, 0),
        (422, true, 0),
        (401, false, 0),
        (407, false, 0),
        (408, false, 0),
        (421, false, 0),
        (425, false, 0),
        (429, false, 0),
        (500, false, 0),
        (503, false, 0),
    ] {
        let key = format!("key_{status}");
        let first = send(&service, ask(&key, status)).await;
        assert_eq!(
            (first.status.as_u16(), first.is_replayed()),
            (status, false)
        );
        assert_eq!(count(&pool, "done").await, written, "{status}");
        // If it was no outcome, the retry is the first request.
        let retry = send(&service, ask(&key, 202)).await;
        let expected = if stored { (status, true) } else { (202, false) };
        assert_eq!((retry.status.as_u16(), retry.is_replayed()), expected);
        pool.execute("delete from done").await.unwrap();
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_answer_may_say_how_it_completes(pool: PgPool) {
    for (i, (status, completion, stored, written)) in [
        (402, Completion::Commit, true, 1),
        (429, Completion::CommitAnswer, true, 0),
        (500, Completion::Commit, true, 1),
        (200, Completion::CommitAnswer, true, 0),
        (200, Completion::RollBack, false, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let handler = move |mut tx: Tx| async move {
            work(&mut tx).await;
            (StatusCode::from_u16(status).unwrap(), Extension(completion))
        };
        let service = service(&pool, layer(&pool), handler).await;
        let key = format!("key_{i}");
        let first = send(&service, ask(&key)).await;
        assert_eq!(first.status, status);
        assert_eq!(count(&pool, "done").await, written, "{completion:?}");
        assert_eq!(send(&service, ask(&key)).await.is_replayed(), stored);
        pool.execute("delete from done").await.unwrap();
    }
}

/// A constraint that was met is a common way to find out that something is there.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_refusal_after_a_failed_statement_is_an_outcome(pool: PgPool) {
    let handler = |mut tx: Tx| async move {
        work(&mut tx).await;
        let inserted = tx.execute("insert into done values (null)").await;
        assert!(inserted.is_err());
        (StatusCode::CONFLICT, "it is there")
    };
    let service = service(&pool, layer(&pool), handler).await;
    for replayed in [false, true] {
        let reply = send(&service, ask("key_1")).await;
        assert_eq!(
            (reply.status.as_u16(), reply.is_replayed()),
            (409, replayed)
        );
        assert_eq!(reply.body, "it is there");
    }
    assert_eq!(count(&pool, "done").await, 0);
}

/// Of a request that runs, and of 200 duplicates of it, one asks the database.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn duplicates_of_a_running_request_wait_in_memory(pool: PgPool) {
    let acquired = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&acquired);
    let hosts = PgPoolOptions::new()
        .max_connections(3)
        .min_connections(3)
        .before_acquire(move |_, _| {
            counter.fetch_add(1, Ordering::SeqCst);
            Box::pin(async { Ok(true) })
        })
        .connect_with((*pool.connect_options()).clone())
        .await
        .unwrap();
    eventually("all connections are there", || async {
        hosts.num_idle() == 3
    })
    .await;
    // Opening the pool is one, too.
    let before = acquired.load(Ordering::SeqCst);
    let handler = |mut tx: Tx| async move {
        work(&mut tx).await;
        "done"
    };
    let patient = layer(&hosts).wait(Duration::from_mins(1));
    let impatient = service(
        &pool,
        patient.clone().wait(Duration::from_millis(100)),
        handler,
    )
    .await;
    let patient = service(&pool, patient, handler).await;
    let blocker = pool
        .begin_with("begin; lock table done in share mode")
        .await
        .unwrap();
    let ask_all = |router: &Router| {
        let router = router.clone();
        tokio::spawn(async move { join_all((0..200).map(|_| send(&router, ask("key_1")))).await })
    };
    let router = patient.clone();
    let first = tokio::spawn(async move { send(&router, ask("key_1")).await });
    somebody_is_blocked(&pool).await;
    for reply in ask_all(&impatient).await.unwrap() {
        reply.assert_error(409, "idempotency_key_in_use");
    }
    assert_eq!(acquired.load(Ordering::SeqCst) - before, 1);
    let waiting = ask_all(&patient);
    blocker.rollback().await.unwrap();
    assert!(!first.await.unwrap().is_replayed());
    for reply in waiting.await.unwrap() {
        assert_eq!((reply.body.as_str(), reply.is_replayed()), ("done", true));
    }
    assert_eq!(count(&pool, "done").await, 1);
}

/// If the first one meets a fault, one of those that wait does the work.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn those_that_wait_behind_a_fault_are_served(pool: PgPool) {
    let times = Arc::new(AtomicUsize::new(0));
    let handler = move |mut tx: Tx| {
        let time = times.fetch_add(1, Ordering::SeqCst);
        async move {
            work(&mut tx).await;
            match time {
                0 => panic!("on purpose"),
                1 => StatusCode::INTERNAL_SERVER_ERROR,
                _ => StatusCode::CREATED,
            }
        }
    };
    let hosts = replica(&pool).await;
    let layer = layer(&hosts).wait(Duration::from_mins(1));
    let service = service(&pool, layer, handler).await;
    let blocker = pool
        .begin_with("begin; lock table done in share mode")
        .await
        .unwrap();
    let router = service.clone();
    let all =
        tokio::spawn(async move { join_all((0..50).map(|_| send(&router, ask("key_1")))).await });
    somebody_is_blocked(&pool).await;
    blocker.rollback().await.unwrap();
    let replies = all.await.unwrap();
    let of = |status: u16| replies.iter().filter(|r| r.status == status).count();
    assert_eq!((of(500), of(201)), (2, 48), "{replies:?}");
    assert_eq!(replies.iter().filter(|r| r.is_replayed()).count(), 47);
    assert_eq!(count(&pool, "done").await, 1);
}

/// Another replica holds 50 keys, and each is waited for. However long a look at
/// them takes, whoever else needs the pool has most of it.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn those_that_wait_for_another_replica_leave_the_pool_to_others(pool: PgPool) {
    let hosts = PgPoolOptions::new()
        .max_connections(4)
        .min_connections(4)
        .connect_with((*pool.connect_options()).clone())
        .await
        .unwrap();
    let layer = layer(&hosts).wait(Duration::from_mins(2));
    let service = service(&pool, layer, || async { "done" }).await;
    let ann = Sha256::digest("ann");
    let scopes: Vec<_> = (0..50)
        .map(|i| Scope {
            account_id: AccountId(uuid::Uuid::from_slice(&ann[..16]).unwrap()),
            key: Key::from_header(format!("key_{i}").as_bytes()).unwrap(),
        })
        .collect();
    let rows: Vec<_> = scopes
        .iter()
        .map(|scope| NewRow {
            scope,
            fingerprint: Fingerprint::of_nothing(),
            digests: None,
            operation_id: uuid::Uuid::now_v7(),
            request_id: RequestId::new(),
            answer: None,
            keep: Duration::from_mins(1),
        })
        .collect();
    let mut holder = pool.begin_with("begin").await.unwrap();
    idempotency::claim(&mut holder, &rows).await.unwrap();
    let waiting: Vec<_> = (0..50)
        .map(|i| {
            let router = service.clone();
            tokio::spawn(async move { send(&router, ask(&format!("key_{i}"))).await })
        })
        .collect();
    // From here on each look takes as long as it may.
    holder
        .execute("lock table idempotency_keys in share mode")
        .await
        .unwrap();
    eventually("the pool is free for others, again and again", || async {
        for _ in 0..20 {
            if hosts.try_acquire().is_none() {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    })
    .await;
    holder.rollback().await.unwrap();
    for reply in join_all(waiting).await {
        assert_eq!(reply.unwrap().body, "done");
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn bodies_that_json_tells_apart_are_other_requests(pool: PgPool) {
    let service = service(&pool, layer(&pool), || async { "done" }).await;
    let ask = |key: &str, body: &str| request("/x", "ann", key, body);
    for (i, (first, same, other)) in [
        (
            r#"{"price":1234567890123.4511}"#,
            r#"{ "price": 1234567890123.45110 }"#,
            r#"{"price":1234567890123.4512}"#,
        ),
        (
            r#"{"quantity":2}"#,
            r#"{"quantity":2.0}"#,
            r#"{"quantity":1,"quantity":2}"#,
        ),
        (
            r#"{"a":1,"quantity":1,"quantity":2}"#,
            r#"{"quantity":1,"quantity":2,"a":1}"#,
            r#"{"a":1,"quantity":2,"quantity":1}"#,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("key_{i}");
        assert_eq!(send(&service, ask(&key, first)).await.status, 200);
        assert!(
            send(&service, ask(&key, same)).await.is_replayed(),
            "{same}"
        );
        send(&service, ask(&key, other))
            .await
            .assert_error(422, "idempotency_key_reused");
    }
}

/// A row that the release before wrote is compared by its rule; one of a release
/// that is not known is not guessed at.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_row_of_another_release_is_compared_or_left_alone(pool: PgPool) {
    let service = service(&pool, layer(&pool), || async { "done" }).await;
    let body = r#"{"b": 1.0, "a": "x"}"#;
    assert_eq!(
        send(&service, request("/x", "ann", "key_1", body))
            .await
            .status,
        200
    );
    let counts = STANDARD.encode(r#"{"a":"x","b":1}"#);
    let mut hash = vec![1];
    hash.extend(Sha256::digest(format!("\u{1}POST\n/x\n\"{counts}\"")));
    let set = "update idempotency_keys set request_hash = $1";
    sqlx::query(set).bind(&hash).execute(&pool).await.unwrap();
    assert!(
        send(&service, request("/x", "ann", "key_1", body))
            .await
            .is_replayed()
    );
    let other = r#"{"b": 2, "a": "x"}"#;
    send(&service, request("/x", "ann", "key_1", other))
        .await
        .assert_error(422, "idempotency_key_reused");
    hash[0] = 3;
    sqlx::query(set).bind(&hash).execute(&pool).await.unwrap();
    send(&service, request("/x", "ann", "key_1", body))
        .await
        .assert_error(503, "unavailable");
}
