//! Promise 4: same key, other request: refused.

use std::time::Duration;

use futures::future::join_all;
use payonce::{
    error::Error,
    idempotency::{FieldDigests, Fingerprint},
    writer::Command,
};
use serde_json::json;
use sqlx::PgPool;
use tokio::time::Instant;

use crate::support::{Call, Service, command, somebody_is_blocked};

fn other_body(service: &Service, key: &str) -> Call {
    service
        .post("/v1/charges", key)
        .json(&json!({"amount": 4999, "currency": "usd", "customer": "cus_ABC123"}))
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn one_key_with_two_bodies_in_parallel_makes_one_charge(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.replica();
    for round in 0..20 {
        let key = format!("order_{round}");
        let replies = join_all((0..32).map(|i| {
            let replica = if i % 4 < 2 { &one } else { &other };
            if i % 2 == 0 {
                replica.charge(&key)
            } else {
                other_body(replica, &key)
            }
            .send()
        }))
        .await;
        let (honoured, refused): (Vec<_>, Vec<_>) =
            replies.iter().partition(|reply| reply.status == 200);
        assert_eq!((honoured.len(), refused.len()), (16, 16));
        assert!(honoured.iter().all(|reply| reply.body == honoured[0].body));
        for reply in refused {
            reply.assert_error(422, "idempotency_key_reused");
        }
        assert_eq!(one.count_charges().await, round + 1);
    }
}

/// Nobody knows which request a key belongs to until its row is committed, so
/// the other request waits for that, and is refused then.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn another_body_is_refused_while_the_first_is_in_flight(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut blocker = pool
        .begin_with("begin; lock table charges in share mode")
        .await
        .unwrap();
    let first = tokio::spawn(service.charge("order_1").send());
    somebody_is_blocked(&pool).await;
    let second = tokio::spawn(other_body(&service, "order_1").send());
    sqlx::query("rollback")
        .execute(&mut *blocker)
        .await
        .unwrap();
    assert_eq!(first.await.unwrap().status, 200);
    second
        .await
        .unwrap()
        .assert_error(422, "idempotency_key_reused");
    assert_eq!(service.count_charges().await, 1);
}

/// A client whose honest retry meets somebody else's misuse of its key on the
/// same replica is judged by the row, and not by the request before it.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_honest_retry_behind_a_misuse_is_replayed(pool: PgPool) {
    let one = Service::start(&pool).await;
    let first = one.charge("order_1").send().await;
    let other = one.replica();
    let replies = join_all((0..16).map(|i| {
        if i % 2 == 0 {
            other_body(&other, "order_1")
        } else {
            other.charge("order_1")
        }
        .send()
    }))
    .await;
    for (i, reply) in replies.iter().enumerate() {
        if i % 2 == 0 {
            reply.assert_error(422, "idempotency_key_reused");
        } else {
            assert_eq!(reply.body, first.body);
        }
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn another_path_under_the_same_key_is_refused(pool: PgPool) {
    let service = Service::start(&pool).await;
    let submit = async |path: &str| {
        let mut command = command(service.account_id, "order_1");
        command.fingerprint = Fingerprint::new("POST", path, &command.charge.request);
        command.digests = FieldDigests::new("POST", path, &command.charge.request);
        let wait = Duration::from_secs(2);
        let deadline = Instant::now() + Duration::from_secs(10);
        let command = Command::CreateCharge(Box::new(command));
        service.app.writer.submit(command, wait, deadline).await
    };
    let first = submit("/v1/charges").await.unwrap();
    let replay = submit("/v1/charges").await.unwrap();
    assert!(replay.replayed && !first.replayed);
    assert_eq!(replay.answer, first.answer);
    let elsewhere = Some(vec!["path".to_owned()]);
    assert_eq!(submit("/v1/other").await, Err(Error::KeyReused(elsewhere)));
}

/// A row of a newer release can be neither replayed nor refused by this one.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_fingerprint_of_a_newer_release_is_not_guessed_at(pool: PgPool) {
    let service = Service::start(&pool).await;
    service.charge("order_1").send().await;
    sqlx::query("update idempotency_keys set request_hash = set_byte(request_hash, 0, 2)")
        .execute(&pool)
        .await
        .unwrap();
    service
        .charge("order_1")
        .send()
        .await
        .assert_error(503, "unavailable");
    assert_eq!(service.count_charges().await, 1);
}
