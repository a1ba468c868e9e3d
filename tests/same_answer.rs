//! Promise 3: same key, same answer. A replay has the status and the very bytes
//! of the first answer.

use payonce::accounts;
use serde_json::json;
use sqlx::PgPool;

use crate::support::Service;

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_replay_returns_the_same_bytes(pool: PgPool) {
    let service = Service::start(&pool).await;
    let metadata = json!({"z": "last", "a": "first", "quote": "\"\\/", "text": "ü€𝄞\u{7f} \u{1}"});
    let charge = || {
        service
            .post("/v1/charges", "order_1")
            .json(&json!({"amount": 5000, "currency": "usd", "description": "  two  spaces ", "metadata": metadata}))
            .send()
    };
    let first = charge().await;
    assert_eq!(first.value()["metadata"], metadata);
    for replica in [&service, &service.replica()] {
        let replay = replica
            .post("/v1/charges", "order_1")
            .json(&json!({"amount": 5000, "currency": "usd", "description": "  two  spaces ", "metadata": metadata}))
            .send()
            .await;
        assert_eq!((replay.status, &replay.body), (first.status, &first.body));
        assert!(replay.is_replayed());
        assert_eq!(
            replay.headers["content-type"],
            first.headers["content-type"]
        );
        assert_ne!(replay.headers["request-id"], first.headers["request-id"]);
    }
    assert!(!first.is_replayed());
    // The charge written anew from its row would have the same bytes: that is
    // what a retry after the purge relies on.
    let read = service
        .get(&format!("/v1/charges/{}", first.charge_id()))
        .send()
        .await;
    assert_eq!(read.body, first.body);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn json_form_order_and_quotes_make_no_difference(pool: PgPool) {
    let service = Service::start(&pool).await;
    let post = |key: &str| service.post("/v1/charges", key);
    let first = post("order_1")
        .json(&json!({"amount": 5000, "currency": "usd", "customer": "cus_1", "metadata": {"order": "7", "shop": "a b"}}))
        .send()
        .await;
    assert_eq!(first.status, 200);
    let others = [
        post("order_1").json(&json!({"metadata": {"shop": "a b", "order": "7"}, "customer": "cus_1", "currency": "usd", "amount": 5000})),
        post("order_1").json(&json!({"amount": 5000, "currency": "usd", "customer": "cus_1", "capture": true, "description": null,
            "metadata": {"order": "7", "shop": "a b", "gone": ""}})),
        post("order_1").header("content-type", "application/json; charset=UTF-8")
            .body(" {\n\"amount\" : 5000,\t\"currency\":\"u\\u0073d\",\"customer\":\"cus_1\",\"metadata\":{\"order\":\"7\",\"shop\":\"a b\"} } "),
        post("order_1").form("amount=5000&currency=usd&customer=cus_1&metadata[order]=7&metadata[shop]=a+b"),
        post("order_1").form("metadata%5Bshop%5D=a%20b&metadata[order]=7&customer=cus_1&currency=usd&amount=5000"),
        post("\"order_1\"").form("amount=5000&currency=usd&customer=cus_1&metadata[order]=7&metadata[shop]=a+b&capture=true"),
    ];
    for other in others {
        let other = other.send().await;
        assert_eq!(other.body, first.body);
        assert!(other.is_replayed());
    }
    assert_eq!(service.count_charges().await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_decline_is_stored_and_replayed(pool: PgPool) {
    let service = Service::start(&pool).await;
    let decline = || {
        service
            .post("/v1/charges", "order_1")
            .json(&json!({"amount": 5000, "currency": "usd", "source": "tok_chargeDeclinedExpiredCard"}))
            .send()
    };
    let first = decline().await;
    first.assert_error(402, "expired_card");
    let replay = decline().await;
    assert_eq!((replay.status, &replay.body), (first.status, &first.body));
    assert!(replay.is_replayed());
    assert_eq!(replay.headers["content-type"], "application/problem+json");
    assert_eq!(replay.headers["stripe-should-retry"], "false");

    let id = first.value()["error"]["charge"]
        .as_str()
        .unwrap()
        .to_owned();
    let charge = service
        .get(&format!("/v1/charges/{id}"))
        .send()
        .await
        .value();
    assert_eq!(charge["status"], "failed");
    assert_eq!(charge["paid"], false);
    assert_eq!(charge["amount_captured"], 0);
    assert_eq!(charge["failure_code"], "expired_card");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_rotated_api_key_does_not_make_a_retry_a_new_request(pool: PgPool) {
    let service = Service::start(&pool).await;
    let first = service.charge("order_1").send().await;
    let mut conn = pool.acquire().await.unwrap();
    let (_, new_key) = accounts::create_api_key(&mut conn, service.account_id)
        .await
        .unwrap()
        .unwrap();
    let retry = service
        .stranger("POST", "/v1/charges")
        .header("authorization", &format!("Bearer {}", new_key.reveal()))
        .header("idempotency-key", "order_1")
        .json(&json!({"amount": 5000, "currency": "usd", "customer": "cus_ABC123"}))
        .send()
        .await;
    assert_eq!(retry.body, first.body);
    assert!(retry.is_replayed());
}
