//! A currency that is retired stays readable: its charges were right when they
//! were made.

use std::time::Duration;

use payonce::{
    charges::{Charge, CreateCharge},
    idempotency::{FieldDigests, Fingerprint, purge},
    money::Currency,
    processor::Outcome,
    writer::Command,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::time::Instant;

use crate::support::{Service, command};

/// No release of ours takes it as input.
const RETIRED: &str = "zzz";

/// A charge as a release made it to which the currency was one in use.
async fn made_before(service: &Service, key: &str) -> Charge {
    let mut before: CreateCharge = command(service.account_id, key);
    let mut request = before.charge.request.clone();
    request.currency = Currency::from_stored(RETIRED).unwrap();
    request.capture = false;
    before.fingerprint = Fingerprint::new("POST", "/v1/charges", &request);
    before.digests = FieldDigests::new("POST", "/v1/charges", &request);
    before.charge = Charge::decided(request, Outcome::Approved, before.charge.request_id);
    before.answer = before.charge.answer();
    let charge = before.charge.clone();
    let deadline = Instant::now() + Duration::from_secs(10);
    let writer = &service.app.writer;
    let command = Command::CreateCharge(Box::new(before));
    writer
        .submit(command, Duration::ZERO, deadline)
        .await
        .unwrap();
    charge
}

fn body(amount: i64) -> Value {
    json!({"amount": amount, "currency": RETIRED, "capture": false})
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_charge_of_a_retired_currency_is_read_changed_and_replayed(pool: PgPool) {
    let service = Service::start(&pool).await;
    let made = made_before(&service, "order_1").await;
    let path = format!("/v1/charges/{}", made.id);

    let read = service.get(&path).send().await;
    assert_eq!((read.status.as_u16(), &read.body), (200, &made.to_json()));
    let list = service.get("/v1/charges").send().await;
    assert_eq!(list.status, 200, "{list:?}");
    assert_eq!(list.value()["data"][0], read.value());

    // As long as the answer is kept, and when only the charge is left.
    for purged in [false, true] {
        if purged {
            sqlx::query("update idempotency_keys set expires_at = now() - interval '1 second'")
                .execute(&pool)
                .await
                .unwrap();
            purge::run_until_done(&pool).await.unwrap();
        }
        let retry = service.post("/v1/charges", "order_1").json(&body(5000));
        let retry = retry.send().await;
        assert_eq!((retry.status, &retry.body), (read.status, &read.body));
        assert!(retry.is_replayed());
        let other = service.post("/v1/charges", "order_1").json(&body(4999));
        other
            .send()
            .await
            .assert_error(422, "idempotency_key_reused");
    }

    let capture = service
        .post(&format!("{path}/capture"), "capture_1")
        .json(&json!({"amount": 3000}));
    let capture = capture.send().await;
    assert_eq!(capture.status, 200, "{capture:?}");
    let refund = || {
        service
            .post("/v1/refunds", "refund_1")
            .json(&json!({"charge": made.id, "amount": 1000}))
            .send()
    };
    let first = refund().await;
    assert_eq!(first.status, 200, "{first:?}");
    assert_eq!(first.value()["currency"], RETIRED);
    let refunds = service.get("/v1/refunds").send().await;
    assert_eq!(refunds.value()["data"][0], first.value());
    // The refund, too, when only it is left.
    sqlx::query("delete from idempotency_keys")
        .execute(&pool)
        .await
        .unwrap();
    let late = refund().await;
    assert_eq!((late.status, &late.body), (first.status, &first.body));
    assert_eq!(service.count_charges().await, 1);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn nothing_new_is_charged_in_it(pool: PgPool) {
    let service = Service::start(&pool).await;
    made_before(&service, "order_1").await;
    let other = service.other_account().await;
    for (who, key) in [(&service, "order_2"), (&other, "order_1")] {
        let new = who.post("/v1/charges", key).json(&body(5000)).send().await;
        new.assert_error(400, "parameter_invalid");
        assert_eq!(new.value()["error"]["param"], "currency");
    }
    assert_eq!(service.count_charges().await, 1);
}
