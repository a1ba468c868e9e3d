//! What becomes of a charge afterwards: captures, refunds, updates. Each happens
//! once per key, and all of them together never take or give back too much.

use futures::future::join_all;
use payonce::idempotency::purge;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{Reply, Service, Settings, count, persistently, proxy::Proxy};

/// A charge of 5000 under a key of its own; its id.
async fn charge(service: &Service, key: &str, capture: bool) -> String {
    let reply = service
        .post("/v1/charges", key)
        .json(&json!({"amount": 5000, "currency": "usd", "customer": "cus_1", "capture": capture}))
        .send()
        .await;
    assert_eq!(reply.value()["captured"], capture);
    reply.charge_id()
}

async fn refund(service: &Service, key: &str, charge: &str, amount: Option<i64>) -> Reply {
    let mut body = json!({"charge": charge});
    if let Some(amount) = amount {
        body["amount"] = amount.into();
    }
    persistently(|| service.post("/v1/refunds", key).json(&body))
        .await
        .0
}

async fn capture(service: &Service, key: &str, charge: &str, amount: Option<i64>) -> Reply {
    let body = amount.map_or_else(|| json!({}), |amount| json!({"amount": amount}));
    let path = format!("/v1/charges/{charge}/capture");
    persistently(|| service.post(&path, key).json(&body))
        .await
        .0
}

async fn get(service: &Service, charge: &str) -> Value {
    service
        .get(&format!("/v1/charges/{charge}"))
        .send()
        .await
        .value()
}

/// `captured`, `amount_captured`, `amount_refunded`, `refunded`.
fn money(charge: &Value) -> (bool, i64, i64, bool) {
    (
        charge["captured"].as_bool().unwrap(),
        charge["amount_captured"].as_i64().unwrap(),
        charge["amount_refunded"].as_i64().unwrap(),
        charge["refunded"].as_bool().unwrap(),
    )
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_was_authorised_is_captured_once(pool: PgPool) {
    let service = Service::start(&pool).await;
    let whole = charge(&service, "whole", false).await;
    let done = capture(&service, "capture_1", &whole, None).await;
    assert_eq!(money(&done.value()), (true, 5000, 0, false));
    let replay = capture(&service, "capture_1", &whole, None).await;
    assert_eq!(replay.body, done.body);
    assert!(replay.is_replayed());
    capture(&service, "capture_2", &whole, None)
        .await
        .assert_error(400, "charge_already_captured");
    let at_once = charge(&service, "at_once", true).await;
    capture(&service, "capture_3", &at_once, None)
        .await
        .assert_error(400, "charge_already_captured");

    let part = charge(&service, "part", false).await;
    let too_much = capture(&service, "capture_4", &part, Some(5001)).await;
    too_much.assert_error(400, "amount_too_large");
    assert_eq!(too_much.value()["error"]["param"], "amount");
    assert_eq!(too_much.value()["error"]["charge"], *part);
    let done = capture(&service, "capture_5", &part, Some(3000)).await;
    // What was released is no refund.
    assert_eq!(money(&done.value()), (true, 3000, 0, false));
    assert_eq!(get(&service, &part).await, done.value());
    refund(&service, "refund_1", &part, Some(3001))
        .await
        .assert_error(400, "amount_too_large");
    assert_eq!(
        refund(&service, "refund_2", &part, None).await.value()["amount"],
        3000
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_uncaptured_charge_is_cancelled_as_a_whole(pool: PgPool) {
    let service = Service::start(&pool).await;
    let id = charge(&service, "order_1", false).await;
    refund(&service, "part", &id, Some(4999))
        .await
        .assert_error(400, "charge_not_captured");
    let cancelled = refund(&service, "whole", &id, Some(5000)).await;
    assert_eq!(cancelled.value()["amount"], 5000);
    assert_eq!(money(&get(&service, &id).await), (false, 0, 5000, true));
    capture(&service, "late", &id, None)
        .await
        .assert_error(400, "charge_already_refunded");
    refund(&service, "again", &id, None)
        .await
        .assert_error(400, "charge_already_refunded");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_refund_is_a_refund_in_stripes_shape(pool: PgPool) {
    let service = Service::start(&pool).await;
    let id = charge(&service, "order_1", true).await;
    let body = json!({
        "charge": id, "amount": 1200, "reason": "requested_by_customer", "metadata": {"case": "7"},
    });
    let made = service
        .post("/v1/refunds", "refund_1")
        .json(&body)
        .send()
        .await;
    let refund = made.value();
    for (field, expected) in [
        ("object", json!("refund")),
        ("amount", json!(1200)),
        ("charge", json!(id)),
        ("currency", json!("usd")),
        ("reason", json!("requested_by_customer")),
        ("status", json!("succeeded")),
        ("metadata", json!({"case": "7"})),
    ] {
        assert_eq!(refund[field], expected, "{field}");
    }
    assert!(refund["created"].as_i64().unwrap() > 1_700_000_000);
    let path = format!("/v1/refunds/{}", refund["id"].as_str().unwrap());
    assert_eq!(service.get(&path).send().await.body, made.body);
    let stranger = service.other_account().await;
    stranger
        .get(&path)
        .send()
        .await
        .assert_error(404, "resource_missing");
    assert_eq!(money(&get(&service, &id).await), (true, 5000, 1200, false));
    // As a form, and for the rest.
    let rest = service
        .post("/v1/refunds", "refund_2")
        .form(&format!("charge={id}"))
        .send()
        .await;
    assert_eq!(rest.value()["amount"], 3800);
    assert_eq!(rest.value()["reason"], Value::Null);
    assert_eq!(money(&get(&service, &id).await), (true, 5000, 5000, true));
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn refunds_in_parallel_never_exceed_what_was_captured(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.replica();
    for round in 0..5 {
        let id = charge(&one, &format!("order_{round}"), true).await;
        let replies = join_all((0..64).map(|i| {
            let service = if i % 2 == 0 { &one } else { &other };
            let key = format!("refund_{round}_{i}");
            let id = id.clone();
            async move { refund(service, &key, &id, Some(400)).await }
        }))
        .await;
        let made = replies.iter().filter(|reply| reply.status == 200).count();
        assert_eq!(made, 12, "12 times 400 are in 5000");
        for reply in replies.iter().filter(|reply| reply.status != 200) {
            reply.assert_error(400, "amount_too_large");
        }
        assert_eq!(money(&get(&one, &id).await), (true, 5000, 4800, false));
        // A refusal is an outcome: it is replayed, also when there is money again.
        let refused = replies
            .iter()
            .position(|reply| reply.status == 400)
            .unwrap();
        let key = format!("refund_{round}_{refused}");
        let replay = refund(&other, &key, &id, Some(400)).await;
        assert_eq!(replay.body, replies[refused].body);
        assert!(replay.is_replayed());
    }
    let sum: i64 = sqlx::query_scalar("select sum(amount)::int8 from refunds")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(sum, 5 * 4800);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn one_key_on_two_replicas_makes_one_refund_and_one_capture(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.replica();
    for round in 0..5 {
        let id = charge(&one, &format!("order_{round}"), false).await;
        for change in ["capture", "refund"] {
            let key = format!("{change}_{round}");
            let replies = join_all((0..32).map(|i| {
                let service = if i % 2 == 0 { &one } else { &other };
                let (id, key) = (id.clone(), key.clone());
                async move {
                    match change {
                        "capture" => capture(service, &key, &id, None).await,
                        _ => refund(service, &key, &id, Some(1)).await,
                    }
                }
            }))
            .await;
            assert!(
                replies
                    .iter()
                    .all(|r| r.status == 200 && r.body == replies[0].body)
            );
            assert_eq!(replies.iter().filter(|r| !r.is_replayed()).count(), 1);
        }
        assert_eq!(money(&get(&one, &id).await), (true, 5000, 1, false));
    }
    assert_eq!(count(&pool, "refunds").await, 5);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_capture_and_a_cancellation_at_once_are_one_of_both(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.replica();
    for round in 0..20 {
        let id = charge(&one, &format!("order_{round}"), false).await;
        let (capture_key, refund_key) = (format!("capture_{round}"), format!("refund_{round}"));
        let (captured, refunded) = futures::future::join(
            capture(&one, &capture_key, &id, Some(3000)),
            refund(&other, &refund_key, &id, Some(5000)),
        )
        .await;
        match (captured.status.as_u16(), refunded.status.as_u16()) {
            (200, 400) => assert_eq!(money(&get(&one, &id).await), (true, 3000, 0, false)),
            (400, 200) => assert_eq!(money(&get(&one, &id).await), (false, 0, 5000, true)),
            both => panic!("{both:?}"),
        }
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn changes_of_many_charges_in_another_order_do_not_deadlock(pool: PgPool) {
    let one = Service::start(&pool).await;
    let other = one.replica();
    let ids = join_all((0..50).map(|i| {
        let service = &one;
        async move { charge(service, &format!("order_{i}"), true).await }
    }))
    .await;
    let all = |service: Service, who: &'static str, ids: Vec<String>| async move {
        join_all(ids.iter().map(|id| {
            let service = &service;
            async move { refund(service, &format!("{who}_{id}"), id, Some(1)).await }
        }))
        .await
    };
    let back: Vec<_> = ids.iter().rev().cloned().collect();
    let (forth, back) =
        futures::future::join(all(one.clone(), "forth", ids), all(other, "back", back)).await;
    assert!(forth.iter().chain(&back).all(|reply| reply.status == 200));
    assert_eq!(count(&pool, "refunds").await, 100);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_is_not_there_is_missing_and_burns_no_key(pool: PgPool) {
    let service = Service::start(&pool).await;
    let nobody = "ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e";
    let foreign = charge(&service.other_account().await, "order_1", true).await;
    for id in [nobody, foreign.as_str()] {
        let missing = refund(&service, "refund_1", id, None).await;
        missing.assert_error(404, "resource_missing");
        assert_eq!(missing.value()["error"]["param"], "charge");
        let missing = capture(&service, "capture_1", id, None).await;
        missing.assert_error(404, "resource_missing");
        service
            .post(&format!("/v1/charges/{id}"), "update_1")
            .json(&json!({"description": "x"}))
            .send()
            .await
            .assert_error(404, "resource_missing");
    }
    assert_eq!(count(&pool, "refunds").await, 0);
    assert_eq!(
        count(&pool, "idempotency_keys").await,
        1,
        "that of the foreign charge"
    );
    let id = charge(&service, "order_2", true).await;
    assert_eq!(refund(&service, "refund_1", &id, None).await.status, 200);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_failed_is_neither_captured_nor_refunded(pool: PgPool) {
    let service = Service::start(&pool).await;
    let declined = service
        .post("/v1/charges", "order_1")
        .json(&json!({"amount": 5000, "currency": "usd", "capture": false, "source": "tok_chargeDeclined"}))
        .send()
        .await;
    let id = declined.value()["error"]["charge"]
        .as_str()
        .unwrap()
        .to_owned();
    capture(&service, "capture_1", &id, None)
        .await
        .assert_error(400, "charge_not_capturable");
    refund(&service, "refund_1", &id, None)
        .await
        .assert_error(400, "charge_not_refundable");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn after_the_purge_a_refund_is_found_and_not_made_again(pool: PgPool) {
    let settings = Settings {
        answer_ttl: std::time::Duration::from_micros(1),
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await;
    let id = charge(&service, "order_1", true).await;
    let first = refund(&service, "refund_1", &id, Some(1000)).await;
    for purged in [false, true] {
        if purged {
            purge::run_until_done(&pool).await.unwrap();
        }
        // Beside a new one, which must not suffer from it.
        let key = format!("new_{purged}");
        let (late, new) = futures::future::join(
            refund(&service, "refund_1", &id, Some(1000)),
            refund(&service, &key, &id, Some(1)),
        )
        .await;
        assert_eq!((late.status, &late.body), (first.status, &first.body));
        assert!(late.is_replayed());
        assert_eq!(new.status, 200);
        refund(&service, "refund_1", &id, Some(999))
            .await
            .assert_error(422, "idempotency_key_reused");
    }
    assert_eq!(money(&get(&service, &id).await), (true, 5000, 1002, false));
    assert_eq!(count(&pool, "refunds").await, 3);
    // A charge's own late retry tells what has become of it since.
    let late = charge(&service, "order_1", true).await;
    assert_eq!(late, id);
}

/// A charge that has nothing left, or too little, refuses before anything is inserted;
/// the refund that took it is the answer all the same.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn after_the_purge_a_refund_is_found_before_it_is_refused(pool: PgPool) {
    let settings = Settings {
        answer_ttl: std::time::Duration::from_micros(1),
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await;
    let whole = charge(&service, "order_1", true).await;
    let part = charge(&service, "order_2", true).await;
    let first_whole = refund(&service, "whole", &whole, None).await;
    let first_part = refund(&service, "part", &part, Some(3000)).await;
    for purged in [false, true] {
        if purged {
            purge::run_until_done(&pool).await.unwrap();
        }
        let late = refund(&service, "whole", &whole, None).await;
        assert_eq!(
            (late.status, &late.body),
            (first_whole.status, &first_whole.body)
        );
        assert!(late.is_replayed());
        let late = refund(&service, "part", &part, Some(3000)).await;
        assert_eq!(
            (late.status, &late.body),
            (first_part.status, &first_part.body)
        );
        assert!(late.is_replayed());
        // Other requests under these keys: a refund, one of no charge, a capture; and
        // a refund under a charge's key.
        for other in [
            refund(&service, "whole", &whole, Some(1)).await,
            refund(&service, "part", &part, Some(2001)).await,
            refund(
                &service,
                "part",
                "ch_00000000000000000000000000000000",
                None,
            )
            .await,
            capture(&service, "part", &part, None).await,
            refund(&service, "order_1", &whole, None).await,
        ] {
            other.assert_error(422, "idempotency_key_reused");
        }
        // What is really too much is refused as ever.
        refund(&service, &format!("new_{purged}"), &part, Some(2001))
            .await
            .assert_error(400, "amount_too_large");
    }
    assert_eq!(count(&pool, "refunds").await, 2);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_change_whose_commit_is_lost_is_found_again(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let direct = Service::start(&pool).await;
    let service = direct.behind(&proxy);
    for (i, committed) in [true, false, true, false].into_iter().enumerate() {
        let id = charge(&service, &format!("order_{i}"), false).await;
        proxy.lose_commits(1, committed);
        let captured = capture(&service, &format!("capture_{i}"), &id, Some(4000)).await;
        assert_eq!(captured.status, 200, "{captured:?}");
        assert!(
            !captured.is_replayed(),
            "it is the first answer, found again"
        );
        proxy.lose_commits(1, committed);
        let refunded = refund(&service, &format!("refund_{i}"), &id, Some(1500)).await;
        assert_eq!(refunded.status, 200, "{refunded:?}");
        assert!(!refunded.is_replayed());
        assert_eq!(proxy.commits_to_lose(), 0);
        assert_eq!(money(&get(&service, &id).await), (true, 4000, 1500, false));
    }
    assert_eq!(count(&pool, "refunds").await, 4);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn description_and_metadata_are_merged_as_stripe_does(pool: PgPool) {
    let service = Service::start(&pool).await;
    let made = service
        .post("/v1/charges", "order_1")
        .json(&json!({"amount": 5000, "currency": "usd", "description": "a", "metadata": {"x": "1", "y": "2"}}))
        .send()
        .await;
    let path = format!("/v1/charges/{}", made.charge_id());
    for (i, (body, description, metadata)) in [
        (json!({}), json!("a"), json!({"x": "1", "y": "2"})),
        (
            json!({"metadata": {"y": "3", "z": "4"}}),
            json!("a"),
            json!({"x": "1", "y": "3", "z": "4"}),
        ),
        (
            json!({"metadata": {"x": ""}}),
            json!("a"),
            json!({"y": "3", "z": "4"}),
        ),
        (
            json!({"metadata": {"y": null}}),
            json!("a"),
            json!({"z": "4"}),
        ),
        (json!({"description": "b"}), json!("b"), json!({"z": "4"})),
        (json!({"description": ""}), Value::Null, json!({"z": "4"})),
        (json!({"metadata": ""}), Value::Null, json!({})),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("update_{i}");
        let updated = service.post(&path, &key).json(&body).send().await;
        let charge = updated.value();
        assert_eq!(
            (&charge["description"], &charge["metadata"]),
            (&description, &metadata),
            "{body}"
        );
        assert_eq!(service.get(&path).send().await.value(), charge);
        let replay = service.post(&path, &key).json(&body).send().await;
        assert_eq!(replay.body, updated.body);
    }
    let form = service
        .post(&path, "form")
        .form("metadata[a]=1&metadata[b]=2&description=c");
    let charge = form.send().await.value();
    assert_eq!(charge["metadata"], json!({"a": "1", "b": "2"}));

    // 50 names are what a charge holds.
    let many: serde_json::Map<_, _> = (0..49).map(|i| (format!("n{i}"), json!("v"))).collect();
    let full = service
        .post(&path, "full")
        .json(&json!({"metadata": many}))
        .send()
        .await;
    full.assert_error(400, "metadata_full");
    assert_eq!(service.get(&path).send().await.value(), charge);
    // Its money is nobody's business here.
    service
        .post(&path, "amount")
        .json(&json!({"amount": 1}))
        .send()
        .await
        .assert_error(400, "parameter_unknown");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn bad_input_is_refused_by_its_name(pool: PgPool) {
    let service = Service::start(&pool).await;
    let id = charge(&service, "order_1", false).await;
    let capture = format!("/v1/charges/{id}/capture");
    let update = format!("/v1/charges/{id}");
    for (path, body, code, param) in [
        ("/v1/refunds", json!({}), "parameter_missing", "charge"),
        (
            "/v1/refunds",
            json!({"charge": ""}),
            "parameter_invalid_empty",
            "charge",
        ),
        (
            "/v1/refunds",
            json!({"charge": 7}),
            "parameter_invalid",
            "charge",
        ),
        (
            "/v1/refunds",
            json!({"charge": "re_1"}),
            "parameter_invalid",
            "charge",
        ),
        (
            "/v1/refunds",
            json!({"charge": id, "amount": 0}),
            "parameter_invalid_integer",
            "amount",
        ),
        (
            "/v1/refunds",
            json!({"charge": id, "amount": "1"}),
            "parameter_invalid_integer",
            "amount",
        ),
        (
            "/v1/refunds",
            json!({"charge": id, "reason": "mood"}),
            "parameter_invalid",
            "reason",
        ),
        (
            "/v1/refunds",
            json!({"charge": id, "metadata": 1}),
            "parameter_invalid",
            "metadata",
        ),
        (
            "/v1/refunds",
            json!({"charge": id, "metadata": {"a": 1}}),
            "parameter_invalid",
            "metadata[a]",
        ),
        (
            "/v1/refunds",
            json!({"charge": id, "currency": "usd"}),
            "parameter_unknown",
            "currency",
        ),
        (
            capture.as_str(),
            json!({"amount": -1}),
            "parameter_invalid_integer",
            "amount",
        ),
        (
            &capture,
            json!({"amount": 1.5}),
            "parameter_invalid_integer",
            "amount",
        ),
        (
            &capture,
            json!({"charge": id}),
            "parameter_unknown",
            "charge",
        ),
        (
            &update,
            json!({"description": 1}),
            "parameter_invalid",
            "description",
        ),
        (
            &update,
            json!({"description": "x".repeat(1001)}),
            "parameter_invalid",
            "description",
        ),
        (
            &update,
            json!({"metadata": {"a[b]": "c"}}),
            "parameter_invalid",
            "metadata[a[b]]",
        ),
        (
            &update,
            json!({"customer": "cus_2"}),
            "parameter_unknown",
            "customer",
        ),
    ] {
        let reply = service.post(path, "key_1").json(&body).send().await;
        reply.assert_error(400, code);
        assert_eq!(reply.value()["error"]["param"], param, "{path} {body}");
    }
    for path in [
        "/v1/charges/ch_1/capture",
        "/v1/charges/re_1",
        "/v1/charges/%ff/capture",
    ] {
        let reply = service.post(path, "key_1").json(&json!({})).send().await;
        reply.assert_error(404, "resource_missing");
    }
    assert_eq!(
        count(&pool, "idempotency_keys").await,
        1,
        "nothing was stored"
    );
}
