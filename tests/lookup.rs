//! What became of a key, and what differs from its first request.

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{Service, count, eventually, somebody_is_blocked};

async fn look_up(service: &Service, key: &str) -> Value {
    let reply = service
        .get(&format!("/v1/idempotency_keys/{key}"))
        .send()
        .await;
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.value()
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_key_tells_what_it_made(pool: PgPool) {
    let service = Service::start(&pool).await;
    let charge = service.charge("order/1?").send().await.charge_id();
    let known = look_up(&service, "order%2F1%3F").await;
    assert_eq!(known["object"], "idempotency_key");
    assert_eq!(known["key"], "order/1?");
    assert_eq!(known["state"], "answered");
    assert_eq!(known["charge"], *charge);
    assert_eq!(known["refund"], Value::Null);
    assert_eq!(known["response_status"], 200);
    let seconds = |field: &str| known[field].as_i64().unwrap();
    assert_eq!(seconds("expires_at") - seconds("created"), 86_400);

    let refund = service
        .post("/v1/refunds", "refund_1")
        .json(&json!({"charge": charge}))
        .send()
        .await
        .value();
    let known = look_up(&service, "refund_1").await;
    assert_eq!(
        (&known["refund"], &known["charge"]),
        (&refund["id"], &Value::Null)
    );

    for (who, key) in [
        (&service, "unknown"),
        (&service, "two%20words"),
        (&service, "%ff"),
        (&service.other_account().await, "refund_1"),
    ] {
        let missing = who.get(&format!("/v1/idempotency_keys/{key}")).send().await;
        missing.assert_error(404, "resource_missing");
    }
    service
        .stranger("GET", "/v1/idempotency_keys/refund_1")
        .send()
        .await
        .assert_error(401, "api_key_invalid");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_key_in_flight_is_in_progress_on_every_replica(pool: PgPool) {
    let service = Service::start(&pool).await;
    let other = service.replica();
    let blocker = pool
        .begin_with("begin; lock table refunds in share mode")
        .await
        .unwrap();
    let charge = service.charge("order_1").send().await.charge_id();
    let request = service
        .post("/v1/refunds", "refund_1")
        .json(&json!({"charge": charge}))
        .send();
    let request = tokio::spawn(request);
    somebody_is_blocked(&pool).await;
    for service in [&service, &other] {
        // Between two attempts, while the table is locked, nobody holds the key.
        let in_progress = || async {
            let reply = service.get("/v1/idempotency_keys/refund_1").send().await;
            reply.status == 200 && reply.value()["state"] == "in_progress"
        };
        eventually("the key is seen to be in progress", in_progress).await;
    }
    blocker.rollback().await.unwrap();
    assert_eq!(request.await.unwrap().status, 200);
    assert_eq!(look_up(&other, "refund_1").await["state"], "answered");
    // Looking it up takes no part in it.
    assert_eq!(count(&pool, "refunds").await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_a_forgotten_key_made_is_still_told(pool: PgPool) {
    let service = Service::start(&pool).await;
    let charge = service.charge("order_1").send().await.charge_id();
    for forget in [
        "update idempotency_keys set expires_at = statement_timestamp()",
        "delete from idempotency_keys",
    ] {
        sqlx::query(forget).execute(&pool).await.unwrap();
        let known = look_up(&service, "order_1").await;
        assert_eq!(known["state"], "answered");
        assert_eq!(known["charge"], *charge);
        assert_eq!(known["expires_at"], Value::Null);
        assert!(known["created"].as_i64().unwrap() > 1_700_000_000);
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_mismatch_says_what_differs_and_never_how(pool: PgPool) {
    let service = Service::start(&pool).await;
    let first = json!({"amount": 5000, "currency": "usd", "customer": "cus_secret", "metadata": {"a": "1"}});
    let charge = service
        .post("/v1/charges", "key_1")
        .json(&first)
        .send()
        .await
        .charge_id();
    for (other, differs) in [
        (
            json!({"amount": 5001, "currency": "usd", "customer": "cus_secret", "metadata": {"a": "1"}}),
            json!(["amount"]),
        ),
        (
            json!({"amount": 5000, "currency": "eur", "customer": "cus_secret", "metadata": {"a": "2"}}),
            json!(["currency", "metadata"]),
        ),
        (
            json!({"amount": 5000, "currency": "usd", "metadata": {"a": "1"}}),
            json!(["customer"]),
        ),
        (
            json!({"amount": 5000, "currency": "usd", "customer": "cus_secret", "metadata": {"a": "1"}, "capture": false}),
            json!(["capture"]),
        ),
    ] {
        let refused = service
            .post("/v1/charges", "key_1")
            .json(&other)
            .send()
            .await;
        refused.assert_error(422, "idempotency_key_reused");
        assert_eq!(refused.value()["differs"], differs);
        assert!(!refused.body.contains("cus_secret"));
        // Stripe's SDKs know this error by 400 alone.
        let stripe = service
            .post("/v1/charges", "key_1")
            .header("stripe-version", "2026-01-01")
            .json(&other)
            .send()
            .await;
        stripe.assert_error(400, "idempotency_key_reused");
        assert_eq!(stripe.value()["status"], 400);
        assert_eq!(stripe.value()["error"]["type"], "idempotency_error");
    }
    let refund = service
        .post("/v1/refunds", "key_1")
        .json(&json!({"charge": charge}))
        .send()
        .await;
    assert_eq!(
        refund.assert_error(422, "idempotency_key_reused").value()["differs"],
        json!(["path"])
    );

    // Not known of rows that were written without.
    sqlx::query("update idempotency_keys set field_digests = null")
        .execute(&pool)
        .await
        .unwrap();
    let refused = service.charge("key_1").send().await;
    refused.assert_error(422, "idempotency_key_reused");
    assert_eq!(refused.value().get("differs"), None);
}
