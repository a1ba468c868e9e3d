//! What one client does too much of is refused, and the others' charges go on.

use std::{convert::Infallible, time::Duration};

use axum::body::{Body, Bytes};
use futures::{FutureExt, StreamExt, future::join_all, stream, stream::FuturesUnordered};
use payonce::{accounts::ApiKey, http::caller};
use serde_json::Value;
use sqlx::PgPool;
use tokio::sync::oneshot;

use crate::support::{
    Reply, Service, Settings, eventually, make_account,
    process::{HttpClient, Process},
    url,
};

/// Connections for reads, and 32 that wait for each.
const CONNECTIONS: u32 = 2;
const ADMITTED: usize = 2 + 2 * 32;

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn reads_beyond_what_may_wait_are_refused_at_once_and_charges_go_on(pool: PgPool) {
    let settings = Settings {
        pool_size: CONNECTIONS,
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await;
    let charge = service.charge("order_1").send().await.charge_id();
    let lock = pool
        .begin_with("begin; lock table refunds in access exclusive mode")
        .await
        .unwrap();
    let paths = [
        "/v1/refunds",
        "/v1/refunds/re_00000000000000000000000000000000",
    ];
    let mut reads: FuturesUnordered<_> = (0..2 * ADMITTED)
        .map(|i| tokio::spawn(service.get(paths[i % 2]).send()))
        .collect();
    for _ in 0..ADMITTED {
        let refused = reads.next().await.unwrap().unwrap();
        refused.assert_error(503, "unavailable");
        assert_eq!(refused.value()["detail"], "Too many reads are waiting.");
        assert_eq!(refused.headers["retry-after"], "1");
    }
    // The others wait. Neither a charge nor the look-up of an API key that is new
    // here is one of them, and neither is the read of a charge.
    let other = service.other_account().await;
    assert_eq!(other.charge("order_1").send().await.status, 200);
    let read = service.get(&format!("/v1/charges/{charge}")).send().await;
    assert_eq!(read.status, 200);
    assert!(reads.next().now_or_never().is_none());
    lock.rollback().await.unwrap();
    while let Some(read) = reads.next().await {
        let read = read.unwrap();
        assert!(matches!(read.status.as_u16(), 200 | 404), "{read:?}");
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_charge_needs_no_connection_of_the_reads(pool: PgPool) {
    let settings = Settings {
        pool_size: CONNECTIONS,
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await;
    let reads = &service.app.pool;
    let _all = [
        reads.acquire().await.unwrap(),
        reads.acquire().await.unwrap(),
    ];
    // The look-up of its API key is the first here.
    assert_eq!(service.charge("order_1").send().await.status, 200);
}

/// What is not the test's own matter takes as long as it likes.
fn forgetting_nothing() -> caller::Options {
    let hour = Duration::from_hours(1);
    caller::Options {
        remembered: hour,
        unknown_remembered: hour,
        failures_max: 5,
        failures_window: hour,
    }
}

async fn service_with(pool: &PgPool, callers: caller::Options) -> Service {
    let settings = Settings {
        callers,
        ..Settings::default()
    };
    Service::start_with(pool, settings).await
}

fn list_with(service: &Service, api_key: &str, address: &str) -> impl Future<Output = Reply> {
    service
        .stranger("GET", "/v1/charges")
        .header("authorization", &format!("Bearer {api_key}"))
        .at_address(address)
        .send()
}

fn unknown() -> String {
    ApiKey::generate().reveal().to_owned()
}

/// A look-up fails from now on, so whatever is answered otherwise cost none.
async fn hide_api_keys(pool: &PgPool) {
    sqlx::query("alter table api_keys rename to hidden")
        .execute(pool)
        .await
        .unwrap();
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_unknown_api_key_is_remembered_for_a_moment(pool: PgPool) {
    let service = service_with(&pool, forgetting_nothing()).await;
    let key = unknown();
    let ask = || list_with(&service, &key, "192.0.2.1");
    ask().await.assert_error(401, "api_key_invalid");
    // One that was just made works at once.
    let (_, made) = make_account(&pool).await;
    assert_eq!(list_with(&service, &made, "192.0.2.1").await.status, 200);
    hide_api_keys(&pool).await;
    ask().await.assert_error(401, "api_key_invalid");
    let other = list_with(&service, &unknown(), "192.0.2.1").await;
    other.assert_error(503, "unavailable");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_address_that_sends_many_unknown_api_keys_is_refused_but_no_customer(pool: PgPool) {
    let callers = caller::Options {
        // Looked up every time.
        remembered: Duration::from_nanos(1),
        ..forgetting_nothing()
    };
    let service = service_with(&pool, callers).await;
    let (_, customer) = make_account(&pool).await;
    for (address, of_the_same, of_another) in [
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::1", "2001:db8:0:2::1"),
    ] {
        for _ in 0..5 {
            assert_eq!(list_with(&service, &customer, address).await.status, 200);
            let failure = list_with(&service, &unknown(), address).await;
            failure.assert_error(401, "api_key_invalid");
        }
        for address in [address, of_the_same] {
            let refused = list_with(&service, &unknown(), address).await;
            refused.assert_error(429, "rate_limited");
            assert_eq!(refused.headers["retry-after"], "3600");
            assert_eq!(list_with(&service, &customer, address).await.status, 200);
        }
        let failure = list_with(&service, &unknown(), of_another).await;
        failure.assert_error(401, "api_key_invalid");
    }
    let unlimited = caller::Options {
        failures_max: 0,
        ..forgetting_nothing()
    };
    let without = service_with(&pool, unlimited).await;
    for _ in 0..6 {
        let failure = list_with(&without, &unknown(), "192.0.2.1").await;
        failure.assert_error(401, "api_key_invalid");
    }
    // No query for those that are refused.
    hide_api_keys(&pool).await;
    let refused = list_with(&service, &unknown(), "192.0.2.1").await;
    refused.assert_error(429, "rate_limited");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn unknown_api_keys_are_counted_by_the_address_of_their_connection(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let process = Process::serve_with(&url(&pool), &[("AUTH_FAILURE_LIMIT", "1")]).await;
    let customer = HttpClient::new(&api_key);
    let charge = customer.charge(&process.address, "order_1").await.unwrap();
    assert_eq!(charge.status, 200);
    let refused = || async {
        let strangers: Vec<_> = (0..10).map(|_| HttpClient::new(&unknown())).collect();
        let replies = strangers
            .iter()
            .map(|stranger| stranger.charge(&process.address, "order_1"));
        let replies = join_all(replies).await;
        replies
            .iter()
            .any(|reply| reply.as_ref().unwrap().status == 429)
    };
    eventually("strangers are refused", refused).await;
    let charge = customer.charge(&process.address, "order_2").await.unwrap();
    assert_eq!(charge.status, 200);
    process.terminate().await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_api_key_that_is_revoked_while_the_body_is_on_its_way_charges_nobody(pool: PgPool) {
    let service = Service::start(&pool).await;
    for revoked in [false, true] {
        let (begun, is_begun) = oneshot::channel();
        let (go_on, may_go_on) = oneshot::channel::<()>();
        let slow_body = stream::once(async move {
            // Whoever reads the body has identified the caller.
            begun.send(()).unwrap();
            may_go_on.await.unwrap();
            Ok::<_, Infallible>(Bytes::from("amount=5000&currency=usd"))
        });
        let call = service
            .post("/v1/charges", if revoked { "order_2" } else { "order_1" })
            .form("")
            .body(Body::from_stream(slow_body));
        let request = tokio::spawn(call.send());
        is_begun.await.unwrap();
        if revoked {
            sqlx::query("update api_keys set revoked_at = now()")
                .execute(&pool)
                .await
                .unwrap();
        }
        // As after a few seconds.
        service.app.callers.forget_accounts();
        go_on.send(()).unwrap();
        let reply = request.await.unwrap();
        if revoked {
            reply.assert_error(401, "api_key_invalid");
            assert_eq!(reply.value()["retry"]["same_key"], Value::Bool(false));
        } else {
            assert_eq!(reply.status, 200, "{reply:?}");
        }
    }
    assert_eq!(service.count_charges().await, 1);
}

/// After a start nobody is known, and all come at once.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_first_requests_after_a_start_all_have_their_turn(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut customers = Vec::new();
    for _ in 0..200 {
        customers.push(service.other_account().await);
    }
    let cold = service.with_cold_callers();
    let charges = customers
        .iter()
        .map(|customer| customer.at(&cold).charge("order_1").send());
    for reply in join_all(charges).await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}
