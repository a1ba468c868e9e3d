//! What comes over a socket as no well-behaved client sends it: everything that
//! reaches the router is answered in the one shape.

use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{Service, count, eventually, make_account, process::Process, url};

/// Status, head and body of what comes back for these bytes.
async fn exchange(address: &str, request: &[u8]) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may be answered, and closed, before all of it was read.
    let _ = stream.write_all(request).await;
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await;
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{text}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

const BODY: &str = r#"{"amount":5000,"currency":"usd"}"#;

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn odd_requests_are_answered_in_the_one_shape(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let process = Process::serve(&url(&pool)).await;
    let address = &process.address;
    let head = |version: &str, key: &str| {
        format!(
            "POST /v1/charges HTTP/{version}\r\nhost: x\r\nconnection: close\r\n\
             authorization: Bearer {api_key}\r\ncontent-type: application/json\r\n\
             idempotency-key: {key}\r\n"
        )
    };
    let length = BODY.len();

    let old = format!(
        "{}content-length: {length}\r\n\r\n{BODY}",
        head("1.0", "old")
    );
    let (status, _, body) = exchange(address, old.as_bytes()).await;
    assert_eq!(status, 200, "{body}");

    let (first, rest) = BODY.split_at(9);
    let chunked = format!(
        "{}transfer-encoding: chunked\r\n\r\n{:x}\r\n{first}\r\n{:x}\r\n{rest}\r\n0\r\n\r\n",
        head("1.1", "chunked"),
        first.len(),
        rest.len(),
    );
    let (status, _, body) = exchange(address, chunked.as_bytes()).await;
    assert_eq!(status, 200, "{body}");
    // More than is taken, and nothing announces it.
    let endless = format!(
        "{}transfer-encoding: chunked\r\n\r\n11000\r\n{}\r\n0\r\n\r\n",
        head("1.1", "endless"),
        "x".repeat(0x11000)
    );
    is_problem(
        &exchange(address, endless.as_bytes()).await,
        413,
        "body_too_large",
    );

    let large = format!(
        "{}x-large: {}\r\ncontent-length: {length}\r\n\r\n{BODY}",
        head("1.1", "large"),
        "x".repeat(16 * 1024)
    );
    let (status, _, body) = exchange(address, large.as_bytes()).await;
    assert_eq!(status, 200, "{body}");
    let long_key = format!(
        "{}content-length: {length}\r\n\r\n{BODY}",
        head("1.1", &"k".repeat(16 * 1024))
    );
    let answer = exchange(address, long_key.as_bytes()).await;
    is_problem(&answer, 400, "idempotency_key_invalid");

    for (method, path, status, code) in [
        ("GET", "/nothing", 404, "route_unknown"),
        ("GET", "/v1", 404, "route_unknown"),
        ("POST", "/v1/charges/x/y/z", 404, "route_unknown"),
        ("GET", "/%00", 404, "route_unknown"),
        ("GET", "/errors/%ff", 404, "route_unknown"),
        ("GET", "/docs/%ff", 404, "route_unknown"),
        ("POST", "/", 405, "method_not_allowed"),
        ("DELETE", "/v1/charges", 405, "method_not_allowed"),
        ("BREW", "/v1/refunds", 405, "method_not_allowed"),
        ("PUT", "/openapi.json", 405, "method_not_allowed"),
        ("POST", "/docs/index.html", 405, "method_not_allowed"),
    ] {
        let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        is_problem(&exchange(address, request.as_bytes()).await, status, code);
    }
    assert_eq!(count(&pool, "charges").await, 3);
    process.terminate().await;
}

#[track_caller]
fn is_problem((status, head, body): &(u16, String, String), expected: u16, code: &str) {
    assert_eq!(*status, expected, "{body}");
    assert!(
        head.contains("content-type: application/problem+json"),
        "{head}"
    );
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["error"]["code"], code);
    assert_eq!(body["status"], expected);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn ten_thousand_levels_are_refused_everywhere(pool: PgPool) {
    let service = Service::start(&pool).await;
    let charge = service.charge("order_1").send().await.charge_id();
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let deep_metadata = format!(
        "{{\"metadata\":{}1{}",
        "{\"a\":".repeat(10_000),
        "}".repeat(10_001)
    );
    for path in [
        "/v1/charges".to_owned(),
        format!("/v1/charges/{charge}"),
        format!("/v1/charges/{charge}/capture"),
        "/v1/refunds".to_owned(),
    ] {
        for body in [&deep, &deep_metadata] {
            let call = service
                .post(&path, "deep")
                .header("content-type", "application/json");
            let reply = call.body(body.clone()).send().await;
            reply.assert_error(400, "parameter_unreadable");
        }
        let form = format!("metadata{}=1", "[a]".repeat(10_000));
        let reply = service.post(&path, "deep").form(&form).send().await;
        reply.assert_error(400, "parameter_unknown");
        let nothing = service.post(&path, "deep").json(&json!(null)).send().await;
        nothing.assert_error(400, "parameter_unreadable");
    }
    assert_eq!(count(&pool, "idempotency_keys").await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_head_has_a_limit(pool: PgPool) {
    let process = Process::serve(&url(&pool)).await;
    let request = format!(
        "GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-large: {}\r\n\r\n",
        "x".repeat(40 * 1024)
    );
    // Hyper's own answer, which has no body.
    let (status, _, body) = exchange(&process.address, request.as_bytes()).await;
    assert_eq!((status, &*body), (431, ""));
    process.terminate().await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn connections_beyond_the_limit_are_told_so(pool: PgPool) {
    let process = Process::serve_with(&url(&pool), &[("CONNECTIONS_MAX", "1")]).await;
    let address = &process.address;
    let mut only = TcpStream::connect(address).await.unwrap();
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").into_bytes();
    only.write_all(&request("/healthz")).await.unwrap();
    let mut answer = [0; 4096];
    let length = only.read(&mut answer).await.unwrap();
    assert!(answer[..length].starts_with(b"HTTP/1.1 200"));

    let refused = exchange(address, &request("/v1/charges")).await;
    is_problem(&refused, 503, "unavailable");
    assert!(refused.1.contains("retry-after: 1"), "{}", refused.1);
    assert!(refused.2.contains("too many connections"), "{}", refused.2);
    // The process is well, and must not be restarted; it takes no charges.
    assert_eq!(exchange(address, &request("/healthz")).await.0, 200);
    assert_eq!(exchange(address, &request("/readyz")).await.0, 503);

    drop(only);
    let has_place = || async {
        let request = b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        exchange(address, request).await.0 == 200
    };
    eventually("its place comes free", has_place).await;
    process.terminate().await;
}
