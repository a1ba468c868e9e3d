//! Requests without a key: refused, or, where it is so set, done once, the same
//! again being refused for a while.

use std::collections::HashSet;

use futures::future::join_all;
use payonce::http::Keyless;
use serde_json::json;
use sqlx::PgPool;

use crate::support::{Call, Reply, Service, Settings, count, proxy::Proxy};

async fn lenient(pool: &PgPool) -> Service {
    let settings = Settings {
        keyless: Keyless::Fingerprint,
        ..Settings::default()
    };
    Service::start_with(pool, settings).await
}

fn keyless(service: &Service) -> Call {
    service
        .call("POST", "/v1/charges")
        .json(&json!({"amount": 5000, "currency": "usd", "customer": "cus_ABC123"}))
}

#[track_caller]
fn assert_duplicate(reply: &Reply, first: &Reply) {
    reply.assert_error(409, "duplicate_request");
    assert_eq!(reply.headers["stripe-should-retry"], "false");
    assert!(!reply.headers.contains_key("retry-after"));
    let body = reply.value();
    assert_eq!(body["error"]["charge"], first.charge_id());
    assert_eq!(
        body["original_request_id"],
        first.headers["request-id"].to_str().unwrap()
    );
    assert_eq!(body["retry"]["same_key"], false);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn unless_it_is_so_set_it_is_refused(pool: PgPool) {
    let service = Service::start(&pool).await;
    keyless(&service)
        .send()
        .await
        .assert_error(400, "idempotency_key_missing");
    assert_eq!(count(&pool, "idempotency_keys").await, 0);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn sixty_four_at_once_make_one_charge(pool: PgPool) {
    let one = lenient(&pool).await;
    let other = one.replica();
    let replies =
        join_all((0..64).map(|i| keyless(if i % 2 == 0 { &one } else { &other }).send())).await;
    let (first, duplicates): (Vec<_>, Vec<_>) =
        replies.iter().partition(|reply| reply.status == 200);
    assert_eq!((first.len(), duplicates.len()), (1, 63));
    for duplicate in duplicates {
        assert_duplicate(duplicate, first[0]);
    }
    assert_eq!(one.count_charges().await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn json_and_form_are_the_same_request_and_another_is_not(pool: PgPool) {
    let service = lenient(&pool).await;
    let first = keyless(&service).send().await;
    let form = service
        .call("POST", "/v1/charges")
        .form("customer=cus_ABC123&currency=usd&amount=5000");
    assert_duplicate(&form.send().await, &first);
    let dearer = service
        .call("POST", "/v1/charges")
        .json(&json!({"amount": 5001, "currency": "usd", "customer": "cus_ABC123"}));
    assert_eq!(dearer.send().await.status, 200);
    let other_account = service.other_account().await;
    assert_eq!(keyless(&other_account).send().await.status, 200);
    // A key that is sent is a key, also beside requests without.
    assert_eq!(service.charge("order_1").send().await.status, 200);
    assert_eq!(service.count_charges().await, 4);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn it_is_kept_for_thirty_seconds_and_then_forgotten(pool: PgPool) {
    let service = lenient(&pool).await;
    let mut made = HashSet::new();
    for forget in [
        "update idempotency_keys set expires_at = statement_timestamp()",
        "delete from idempotency_keys",
        "select 1",
    ] {
        let first = keyless(&service).send().await;
        assert!(made.insert(first.charge_id()));
        assert!(!first.is_replayed());
        assert_duplicate(&keyless(&service).send().await, &first);
        let kept: f64 = sqlx::query_scalar(
            "select extract(epoch from expires_at - created_at)::float8 from idempotency_keys",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        assert!((kept - 30.0).abs() < 0.001, "kept for {kept} s");
        sqlx::query(forget).execute(&pool).await.unwrap();
    }
    assert_eq!(service.count_charges().await, 3);
    let with_a_key: i64 =
        sqlx::query_scalar("select count(*) from charges where idempotency_key is not null")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(with_a_key, 0, "a later request would meet the key");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_a_lost_commit_made_is_a_first_answer(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let service = lenient(&pool).await.behind(&proxy);
    for committed in [true, false] {
        proxy.lose_commits(1, committed);
        let first = keyless(&service).send().await;
        assert_eq!(proxy.commits_to_lose(), 0);
        assert_eq!(first.status, 200, "{first:?}");
        assert_duplicate(&keyless(&service).send().await, &first);
        sqlx::query("delete from idempotency_keys")
            .execute(&pool)
            .await
            .unwrap();
    }
    assert_eq!(service.count_charges().await, 2);
}

/// Its key is none that a client could send.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn no_clients_key_can_meet_it(pool: PgPool) {
    let service = lenient(&pool).await;
    keyless(&service).send().await;
    let key: String = sqlx::query_scalar("select key from idempotency_keys")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert!(key.starts_with("keyless "), "{key}");
    service
        .charge(&key)
        .send()
        .await
        .assert_error(400, "idempotency_key_invalid");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_decline_without_a_key_is_not_done_again_either(pool: PgPool) {
    let service = lenient(&pool).await;
    let decline = || {
        service
            .call("POST", "/v1/charges")
            .json(&json!({"amount": 5000, "currency": "usd", "source": "tok_chargeDeclined"}))
            .send()
    };
    let first = decline().await;
    first.assert_error(402, "card_declined");
    let again = decline().await;
    again.assert_error(409, "duplicate_request");
    assert_eq!(
        again.value()["error"]["charge"],
        first.value()["error"]["charge"]
    );
}
