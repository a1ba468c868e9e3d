//! What shares a transaction with others does not suffer from their size.

use futures::future::join_all;
use payonce::idempotency::{Key, Scope};
use serde_json::json;
use sqlx::PgPool;

use crate::support::{Call, Reply, Service, eventually, proxy::Proxy};

/// A charge that is about 100 kB to the database: its metadata, and the answer with it.
fn large(service: &Service, key: &str) -> Call {
    let text = "\u{1f980}".repeat(250);
    let metadata: serde_json::Map<_, _> = (0..49)
        .map(|i| (format!("name_{i}"), json!(text)))
        .collect();
    service
        .post("/v1/charges", key)
        .json(&json!({"amount": 5000, "currency": "usd", "metadata": metadata}))
}

/// Sends them so that they are queued together, behind two that keep both writing tasks
/// at work.
async fn all_at_once(pool: &PgPool, service: &Service, calls: Vec<(String, Call)>) -> Vec<Reply> {
    let blocker = pool
        .begin_with("begin; lock table charges in share mode")
        .await
        .unwrap();
    let is_queued = |key: String| async move {
        let scope = Scope {
            account_id: service.account_id,
            key: Key::from_header(key.as_bytes()).unwrap(),
        };
        eventually("it is queued", || async {
            service.app.writer.is_in_flight(&scope)
        })
        .await;
    };
    let mut requests = Vec::new();
    for i in 0..2 {
        requests.push(tokio::spawn(service.charge(&format!("first_{i}")).send()));
        crate::support::are_blocked(pool, i + 1).await;
    }
    for (key, call) in calls {
        requests.push(tokio::spawn(call.send()));
        is_queued(key).await;
    }
    blocker.rollback().await.unwrap();
    join_all(requests)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect()
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_transaction_is_bounded_by_bytes_as_well(pool: PgPool) {
    let service = Service::start(&pool).await;
    let keys = (0..64).map(|i| format!("large_{i}"));
    let calls = keys
        .map(|key| (key.clone(), large(&service, &key)))
        .collect();
    for reply in all_at_once(&pool, &service, calls).await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    // One transaction writes them all at a time.
    let most: i64 = sqlx::query_scalar(
        "select max(bytes) from (
            select sum(2 * octet_length(response_body::text)) as bytes
            from idempotency_keys group by xmin::text
         ) as batch",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    // A mebibyte, and the one that goes beyond.
    assert!(
        most < (1 << 20) + 120_000,
        "{most} bytes in one transaction"
    );
    assert!(
        most > 1 << 19,
        "they were not queued together: {most} bytes"
    );
}

/// What is too much for the network at once goes through in parts.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_batch_that_takes_too_long_is_halved(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let service = Service::start(&pool).await.behind(&proxy);
    let mut calls: Vec<_> = (0..4)
        .map(|i| format!("large_{i}"))
        .map(|key| (key.clone(), large(&service, &key)))
        .collect();
    calls.push(("small".to_owned(), service.charge("small")));
    // Room for three of them.
    proxy.choke_on(350_000);
    for reply in all_at_once(&pool, &service, calls).await {
        assert_eq!(reply.status, 200, "{reply:?}");
        assert!(!reply.is_replayed());
    }
    assert_eq!(service.count_charges().await, 7);
}

/// So is a read of many charges.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_read_that_takes_too_long_is_halved(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let service = Service::start(&pool).await.behind(&proxy);
    let mut paths = Vec::new();
    for i in 0..5 {
        let reply = large(&service, &format!("large_{i}")).send().await;
        paths.push(format!("/v1/charges/{}", reply.charge_id()));
    }
    // Both reading tasks are at work.
    let blocker = pool
        .begin_with("begin; lock table charges in access exclusive mode")
        .await
        .unwrap();
    let mut first = Vec::new();
    for (path, blocked) in paths.iter().zip([1, 2]) {
        first.push(tokio::spawn(service.get(path).send()));
        crate::support::are_blocked(&pool, blocked).await;
    }
    // The others wait for them in one queue.
    let mut reads: Vec<_> = paths
        .iter()
        .map(|path| Box::pin(service.get(path).send()))
        .collect();
    for read in &mut reads {
        assert!(futures::poll!(read).is_pending());
    }
    // Room for three of them.
    proxy.choke_on_answers(200_000);
    blocker.rollback().await.unwrap();
    for reply in join_all(reads).await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    for read in first {
        assert_eq!(read.await.unwrap().status, 200);
    }
}
