//! Promise 8: nobody sees another account's keys, charges or answers.

use serde_json::json;
use sqlx::PgPool;

use crate::support::Service;

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_same_key_of_two_accounts_makes_two_charges(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.other_account().await;
    let (a, b) =
        futures::future::join(one.charge("order_1").send(), other.charge("order_1").send()).await;
    assert_ne!(a.charge_id(), b.charge_id());
    assert!(!a.is_replayed() && !b.is_replayed());
    assert_eq!(one.charge("order_1").send().await.body, a.body);
    assert_eq!(other.charge("order_1").send().await.body, b.body);
    // Another request under the key that the other account used is nobody's reuse.
    one.charge("order_2").send().await;
    let fresh = other
        .post("/v1/charges", "order_2")
        .json(&json!({"amount": 1, "currency": "eur"}))
        .send()
        .await;
    assert_eq!(fresh.status, 200);
    assert!(!fresh.is_replayed());
    assert_eq!(one.count_charges().await, 4);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn another_accounts_charge_is_not_there(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.other_account().await;
    let id = one.charge("order_1").send().await.charge_id();
    other
        .get(&format!("/v1/charges/{id}"))
        .send()
        .await
        .assert_error(404, "resource_missing");
    other
        .get(&format!("/v1/charges?starting_after={id}"))
        .send()
        .await
        .assert_error(404, "resource_missing");
    let list = other.get("/v1/charges").send().await.value();
    assert_eq!(list["data"], json!([]));
    assert_eq!(list["has_more"], false);
}
