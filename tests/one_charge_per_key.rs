//! Promise 1: a key names one operation, forever. At most one charge per
//! account and key.

use std::{collections::HashSet, time::Duration};

use futures::future::join_all;
use payonce::{idempotency::purge, ids::ChargeId};
use serde_json::json;
use sqlx::PgPool;

use crate::support::{Service, Settings, count};

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn sixty_four_requests_with_one_key_make_one_charge(pool: PgPool) {
    let service = Service::start(&pool).await;
    let replies = join_all((0..64).map(|_| service.charge("order_1").send())).await;
    let bodies: HashSet<_> = replies
        .iter()
        .map(|reply| (reply.status.as_u16(), &reply.body))
        .collect();
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    assert_eq!(replies[0].status, 200);
    assert_eq!(
        replies.iter().filter(|reply| !reply.is_replayed()).count(),
        1,
        "one is the first"
    );
    assert_eq!(service.count_charges().await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn two_replicas_charge_once(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.replica();
    for round in 0..20 {
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
        assert_eq!(
            replies.iter().filter(|reply| !reply.is_replayed()).count(),
            1
        );
        assert_eq!(one.count_charges().await, round + 1);
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn two_replicas_with_the_same_keys_in_another_order_do_not_deadlock(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.replica();
    let keys: Vec<_> = (0..200).map(|i| format!("order_{i}")).collect();
    let forth = join_all(keys.iter().map(|key| one.charge(key).send()));
    let back = join_all(keys.iter().rev().map(|key| other.charge(key).send()));
    let (forth, back) = futures::future::join(forth, back).await;
    for (one, other) in forth.iter().zip(back.iter().rev()) {
        assert_eq!(one.body, other.body);
    }
    assert_eq!(one.count_charges().await, 200);
}

/// Answers that expire at once, so that a retry finds the row expired.
async fn forgetful(pool: &PgPool) -> Service {
    let settings = Settings {
        answer_ttl: Duration::from_micros(1),
        ..Settings::default()
    };
    Service::start_with(pool, settings).await
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn after_the_answer_expired_the_charge_is_found(pool: PgPool) {
    let service = forgetful(&pool).await;
    let first = service.charge("order_1").send().await;
    for _ in 0..3 {
        let late = service.charge("order_1").send().await;
        assert_eq!((late.status, &late.body), (first.status, &first.body));
        assert!(late.is_replayed());
        let other = service
            .post("/v1/charges", "order_1")
            .json(&json!({"amount": 1, "currency": "usd"}))
            .send()
            .await;
        other.assert_error(422, "idempotency_key_reused");
    }
    assert_eq!(service.count_charges().await, 1);
    assert_eq!(count(&pool, "idempotency_keys").await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn after_the_purge_the_charge_is_found(pool: PgPool) {
    let service = forgetful(&pool).await;
    let first = service.charge("order_1").send().await;
    for _ in 0..3 {
        purge::run_until_done(&pool).await.unwrap();
        assert_eq!(count(&pool, "idempotency_keys").await, 0);
        let late = service.charge("order_1").send().await;
        assert_eq!((late.status, &late.body), (first.status, &first.body));
        assert!(late.is_replayed());
    }
    assert_eq!(service.count_charges().await, 1);
}

/// The row that is claimed anew is the old charge's from then on, so that the
/// next retry is replayed from it.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn after_the_purge_the_row_is_the_old_charges(pool: PgPool) {
    let service = forgetful(&pool).await;
    let first = service.charge("order_1").send().await;
    purge::run_until_done(&pool).await.unwrap();
    let keeping = service.replica_with(Settings::default());
    for _ in 0..2 {
        let late = keeping.charge("order_1").send().await;
        assert_eq!((late.status, &late.body), (first.status, &first.body));
        assert!(late.is_replayed());
        let operation_id: sqlx::types::Uuid =
            sqlx::query_scalar("select operation_id from idempotency_keys")
                .fetch_one(&pool)
                .await
                .unwrap();
        assert_eq!(ChargeId(operation_id).to_string(), first.charge_id());
    }
}

/// The asker with the other request claims the key again, but for the charge
/// that is there: the honest retry after it gets its replay.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn after_the_purge_another_request_is_refused_and_takes_nothing(pool: PgPool) {
    let service = forgetful(&pool).await;
    let first = service.charge("order_1").send().await;
    purge::run_until_done(&pool).await.unwrap();

    let keeping = service.replica_with(Settings::default());
    let other = keeping
        .post("/v1/charges", "order_1")
        .json(&json!({"amount": 1, "currency": "usd"}))
        .send()
        .await;
    other.assert_error(422, "idempotency_key_reused");
    let retry = keeping.charge("order_1").send().await;
    assert_eq!(retry.body, first.body);
    assert!(retry.is_replayed());
    assert_eq!(service.count_charges().await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn many_late_retries_on_two_replicas_make_no_charge(pool: PgPool) {
    let one = forgetful(&pool).await;
    let other = one.replica();
    let first = one.charge("order_1").send().await;
    let replies = join_all((0..64).map(|i| {
        if i % 2 == 0 { &one } else { &other }
            .charge("order_1")
            .send()
    }))
    .await;
    for reply in replies {
        assert_eq!((reply.status, &reply.body), (first.status, &first.body));
    }
    assert_eq!(one.count_charges().await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_decline_is_found_after_the_purge_too(pool: PgPool) {
    let service = forgetful(&pool).await;
    let decline = || {
        service
            .post("/v1/charges", "order_1")
            .json(&json!({"amount": 5000, "currency": "usd", "source": "tok_chargeDeclinedInsufficientFunds"}))
            .send()
    };
    let first = decline().await;
    purge::run_until_done(&pool).await.unwrap();
    let late = decline().await;
    late.assert_error(402, "card_declined");
    assert!(late.is_replayed());
    assert_eq!(late.body, first.body);
    assert_eq!(service.count_charges().await, 1);
}
