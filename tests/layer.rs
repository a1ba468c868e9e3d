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
    Router,
    body::{Body, Bytes},
    handler::Handler,
    http::{Method, Request, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures::{future::join_all, stream};
use http_body_util::BodyExt;
use payonce::{
    idempotency::{Duplicate, Rule, Scenario, purge},
    layer::{Idempotent, Tx},
};
use sqlx::{Executor, PgPool, postgres::PgPoolOptions};
use tower::ServiceExt;

use crate::support::{Reply, count, eventually, somebody_is_blocked};

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
    let layer = layer(&pool).stores(|status| status.is_success());
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
