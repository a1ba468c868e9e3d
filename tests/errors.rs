//! Every row of the error table as a client sees it, and every bad input by its
//! name.

use std::time::Duration;

use futures::future::join_all;
use insta::{assert_json_snapshot, dynamic_redaction, with_settings};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{Call, Reply, Service, Settings, count};

/// Status, the headers that matter, and the body.
fn seen(reply: &Reply) -> Value {
    let header = |name: &str| reply.headers.get(name).map(|value| value.to_str().unwrap());
    assert!(header("request-id").unwrap().starts_with("req_"));
    let body = reply.value();
    if let Some(instance) = body["instance"].as_str() {
        assert!(instance.starts_with("req_"));
    }
    json!({
        "status": reply.status.as_u16(),
        "content-type": header("content-type"),
        "stripe-should-retry": header("stripe-should-retry"),
        "retry-after": header("retry-after"),
        "allow": header("allow"),
        "www-authenticate": header("www-authenticate"),
        "body": body,
    })
}

macro_rules! snapshot {
    ($name:expr, $reply:expr) => {
        with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
            assert_json_snapshot!($name, seen(&$reply), {
                ".body.instance" => "[request id]",
                ".body.id" => "[charge id]",
                ".body.created" => "[time]",
                ".body.error.charge" => dynamic_redaction(|id, _| if id.is_nil() { id } else { "[charge id]".into() }),
            });
        });
    };
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn every_row_of_the_table(pool: PgPool) {
    let service = Service::start(&pool).await;
    let good = json!({"amount": 5000, "currency": "usd", "customer": "cus_ABC123"});
    let post = |key: &str| service.post("/v1/charges", key);
    let calls: Vec<(&str, Call)> = vec![
        ("200_charge", post("order_1").json(&good)),
        (
            "401_no_api_key",
            service
                .stranger("POST", "/v1/charges")
                .header("idempotency-key", "k")
                .json(&good),
        ),
        (
            "401_unknown_api_key",
            service.stranger("GET", "/v1/charges").header(
                "authorization",
                &format!("Bearer sk_test_{}", "x".repeat(32)),
            ),
        ),
        ("404_route_unknown", service.get("/v1/nothing")),
        (
            "405_method_not_allowed",
            service.call("DELETE", "/v1/charges"),
        ),
        (
            "413_body_too_large",
            post("k")
                .header("content-type", "application/json")
                .body(" ".repeat(65 * 1024)),
        ),
        (
            "415_media_type_unsupported",
            post("k")
                .header("content-type", "text/plain")
                .body(good.to_string()),
        ),
        (
            "400_idempotency_key_missing",
            service.call("POST", "/v1/charges").json(&good),
        ),
        ("400_idempotency_key_invalid", post("two words").json(&good)),
        (
            "400_parameter_missing",
            post("k").json(&json!({"currency": "usd"})),
        ),
        (
            "422_idempotency_key_reused",
            post("order_1").json(&json!({"amount": 1, "currency": "usd"})),
        ),
        (
            "402_card_declined",
            post("order_2")
                .form("amount=1&currency=usd&source=tok_chargeDeclinedInsufficientFunds"),
        ),
        (
            "404_resource_missing",
            service.get("/v1/charges/ch_00000000000000000000000000000000"),
        ),
        ("404_resource_malformed", service.get("/v1/charges/42")),
    ];
    for (name, call) in calls {
        let reply = call.send().await;
        assert_eq!(
            name[..3],
            reply.status.as_u16().to_string(),
            "{name}: {reply:?}"
        );
        snapshot!(name, reply);
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_key_in_use(pool: PgPool) {
    let service = Service::start(&pool).await;
    service.charge("order_1").send().await;
    sqlx::query("update idempotency_keys set response_status = null, response_body = null")
        .execute(&pool)
        .await
        .unwrap();
    let reply = service
        .charge("order_1")
        .header("prefer", "wait=0")
        .send()
        .await;
    snapshot!("409_idempotency_key_in_use", reply);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn overloaded(pool: PgPool) {
    let service = Service::start_with(
        &pool,
        Settings {
            queue_max: 1,
            ..Settings::default()
        },
    )
    .await;
    let blocker = pool
        .begin_with("begin; lock table charges in share mode")
        .await
        .unwrap();
    let first = tokio::spawn(service.charge("order_1").send());
    crate::support::somebody_is_blocked(&pool).await;
    let reply = service.charge("order_2").send().await;
    snapshot!("503_unavailable", reply);
    blocker.rollback().await.unwrap();
    assert_eq!(first.await.unwrap().status, 200);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_bug(pool: PgPool) {
    let service = Service::start(&pool).await;
    sqlx::query("alter table charges add constraint poison check (amount <> 666)")
        .execute(&pool)
        .await
        .unwrap();
    let reply = service
        .post("/v1/charges", "order_1")
        .form("amount=666&currency=usd")
        .send()
        .await;
    snapshot!("500_internal", reply);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_error_points_to_a_page(pool: PgPool) {
    let service = Service::start(&pool).await;
    let error = service.get("/v1/nothing").send().await.value();
    assert_eq!(error["type"], error["error"]["doc_url"]);
    let page = service
        .stranger("GET", error["type"].as_str().unwrap())
        .send()
        .await;
    assert_eq!(page.status, 200);
    assert!(page.body.starts_with("# route_unknown"), "{}", page.body);
    service
        .get("/errors/nothing")
        .send()
        .await
        .assert_error(404, "route_unknown");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn bad_json_is_refused_by_its_name(pool: PgPool) {
    let service = Service::start(&pool).await;
    let long = |length: usize| "x".repeat(length);
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let fifty_one: Vec<_> = (0..51).map(|i| format!("\"k{i}\":\"v\"")).collect();
    let with = |field: &str| format!("{{\"amount\":5000,\"currency\":\"usd\",{field}}}");
    let cases: Vec<(String, &str, Option<&str>)> = vec![
        // The body as a whole.
        (String::new(), "parameter_unreadable", None),
        ("{".to_owned(), "parameter_unreadable", None),
        (
            "{\"amount\":5000,}".to_owned(),
            "parameter_unreadable",
            None,
        ),
        ("[]".to_owned(), "parameter_unreadable", None),
        ("null".to_owned(), "parameter_unreadable", None),
        ("\"amount\"".to_owned(), "parameter_unreadable", None),
        ("{} {}".to_owned(), "parameter_unreadable", None),
        (with("\"x\":\"\\ud800\""), "parameter_unreadable", None),
        (
            with(&format!("\"metadata\":{}", nested(1000))),
            "parameter_unreadable",
            None,
        ),
        (nested(30_000), "parameter_unreadable", None),
        // Missing, unknown, repeated.
        ("{}".to_owned(), "parameter_missing", Some("amount")),
        (
            "{\"currency\":\"usd\"}".to_owned(),
            "parameter_missing",
            Some("amount"),
        ),
        (
            "{\"amount\":null,\"currency\":\"usd\"}".to_owned(),
            "parameter_missing",
            Some("amount"),
        ),
        (
            "{\"amount\":5000}".to_owned(),
            "parameter_missing",
            Some("currency"),
        ),
        (
            with("\"colour\":\"red\""),
            "parameter_unknown",
            Some("colour"),
        ),
        (with("\"Amount\":5000"), "parameter_unknown", Some("Amount")),
        (with("\"x\":null"), "parameter_unknown", Some("x")),
        (
            with("\"amount\":5000"),
            "parameter_repeated",
            Some("amount"),
        ),
        (
            with("\"metadata\":{\"a\":\"1\",\"a\":\"2\"}"),
            "parameter_repeated",
            Some("metadata[a]"),
        ),
        // Amounts.
        (
            "{\"amount\":\"5000\",\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":50.0,\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":50.5,\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":5e3,\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":0,\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":-1,\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":1000000000000,\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":9223372036854775808,\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":99999999999999999999999,\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":true,\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":[5000],\"currency\":\"usd\"}".to_owned(),
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "{\"amount\":1e999,\"currency\":\"usd\"}".to_owned(),
            "parameter_unreadable",
            None,
        ),
        // Currencies.
        (
            "{\"amount\":5000,\"currency\":\"zzz\"}".to_owned(),
            "parameter_invalid",
            Some("currency"),
        ),
        (
            "{\"amount\":5000,\"currency\":\"USD\"}".to_owned(),
            "parameter_invalid",
            Some("currency"),
        ),
        (
            "{\"amount\":5000,\"currency\":\"\"}".to_owned(),
            "parameter_invalid_empty",
            Some("currency"),
        ),
        (
            "{\"amount\":5000,\"currency\":840}".to_owned(),
            "parameter_invalid",
            Some("currency"),
        ),
        // Texts.
        (
            with("\"customer\":\"\""),
            "parameter_invalid_empty",
            Some("customer"),
        ),
        (
            with("\"customer\":7"),
            "parameter_invalid",
            Some("customer"),
        ),
        (
            with("\"customer\":\"a\\u0000b\""),
            "parameter_invalid",
            Some("customer"),
        ),
        (
            with(&format!("\"customer\":\"{}\"", long(256))),
            "parameter_invalid",
            Some("customer"),
        ),
        (
            with("\"description\":\"\\u0000\""),
            "parameter_invalid",
            Some("description"),
        ),
        (
            with(&format!("\"description\":\"{}\"", long(1001))),
            "parameter_invalid",
            Some("description"),
        ),
        (
            with("\"source\":\"tok_nothing\""),
            "parameter_invalid",
            Some("source"),
        ),
        (
            with("\"source\":{\"number\":\"4242424242424242\"}"),
            "parameter_invalid",
            Some("source"),
        ),
        (
            with("\"capture\":\"true\""),
            "parameter_invalid",
            Some("capture"),
        ),
        (with("\"capture\":1"), "parameter_invalid", Some("capture")),
        // Metadata.
        (
            with("\"metadata\":[]"),
            "parameter_invalid",
            Some("metadata"),
        ),
        (
            with("\"metadata\":\"x\""),
            "parameter_invalid",
            Some("metadata"),
        ),
        (
            with("\"metadata\":{\"order\":7}"),
            "parameter_invalid",
            Some("metadata[order]"),
        ),
        (
            with("\"metadata\":{\"order\":{\"id\":\"7\"}}"),
            "parameter_invalid",
            Some("metadata[order]"),
        ),
        (
            with("\"metadata\":{\"order\":\"\\u0000\"}"),
            "parameter_invalid",
            Some("metadata[order]"),
        ),
        (
            with("\"metadata\":{\"\":\"7\"}"),
            "parameter_invalid",
            Some("metadata[]"),
        ),
        (
            with("\"metadata\":{\"a\\u0000\":\"7\"}"),
            "parameter_invalid",
            Some("metadata[a]"),
        ),
        (
            with(&format!("\"metadata\":{{\"order\":\"{}\"}}", long(501))),
            "parameter_invalid",
            Some("metadata[order]"),
        ),
        (
            with(&format!("\"metadata\":{{{}}}", fifty_one.join(","))),
            "parameter_invalid",
            Some("metadata"),
        ),
    ];
    for (body, code, param) in cases {
        let shown: String = body.chars().take(100).collect();
        let reply = service
            .post("/v1/charges", "k")
            .header("content-type", "application/json")
            .body(body)
            .send()
            .await;
        assert_refused(&reply, code, param, &shown);
    }
    let key_of_41 = with(&format!("\"metadata\":{{\"{}\":\"7\"}}", long(41)));
    let reply = service
        .post("/v1/charges", "k")
        .header("content-type", "application/json")
        .body(key_of_41)
        .send()
        .await;
    assert_refused(
        &reply,
        "parameter_invalid",
        Some(&format!("metadata[{}]", long(41))),
        "a name of 41 characters",
    );
    assert_eq!(service.count_charges().await, 0);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_bad_form_is_refused_by_its_name(pool: PgPool) {
    let service = Service::start(&pool).await;
    for (body, code, param) in [
        ("", "parameter_missing", Some("amount")),
        (
            "amount&currency=usd",
            "parameter_invalid_empty",
            Some("amount"),
        ),
        (
            "amount=5000.0&currency=usd",
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "amount=05000&currency=usd",
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "amount=+5000&currency=usd",
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "amount=9223372036854775808&currency=usd",
            "parameter_invalid_integer",
            Some("amount"),
        ),
        (
            "amount=5000&amount=5000&currency=usd",
            "parameter_repeated",
            Some("amount"),
        ),
        (
            "amount=5000&currency=usd&colour=red",
            "parameter_unknown",
            Some("colour"),
        ),
        (
            "amount=5000&currency=usd&customer=",
            "parameter_invalid_empty",
            Some("customer"),
        ),
        (
            "amount=5000&currency=usd&customer=a%00b",
            "parameter_invalid",
            Some("customer"),
        ),
        (
            "amount=5000&currency=usd&customer=%ff",
            "parameter_unreadable",
            None,
        ),
        (
            "amount=5000&currency=usd&customer[id]=1",
            "parameter_invalid",
            Some("customer"),
        ),
        (
            "amount=5000&currency=usd&capture=yes",
            "parameter_invalid",
            Some("capture"),
        ),
        (
            "amount=5000&currency=usd&metadata[a]=1&metadata[a]=2",
            "parameter_repeated",
            Some("metadata[a]"),
        ),
        (
            "amount=5000&currency=usd&metadata[a][b]=1",
            "parameter_unknown",
            Some("metadata[a][b]"),
        ),
        (
            "amount=5000&currency=usd&metadata[a=1",
            "parameter_unknown",
            Some("metadata[a"),
        ),
        (
            "amount=5000&currency=usd&metadata[]=1",
            "parameter_invalid",
            Some("metadata[]"),
        ),
        (
            "amount=5000&currency=usd&[a]=1",
            "parameter_unknown",
            Some("[a]"),
        ),
        ("{\"amount\":5000}", "parameter_missing", Some("amount")),
    ] {
        let reply = service.post("/v1/charges", "k").form(body).send().await;
        assert_refused(&reply, code, param, body);
    }
    assert_eq!(service.count_charges().await, 0);
}

#[track_caller]
fn assert_refused(reply: &Reply, code: &str, param: Option<&str>, input: &str) {
    assert_eq!(reply.status, 400, "{input}: {reply:?}");
    let error = &reply.value()["error"];
    assert_eq!(
        (error["code"].as_str(), error["param"].as_str()),
        (Some(code), param),
        "{input}: {error}"
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_body_that_is_not_utf_8_is_refused(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut body = b"{\"amount\":5000,\"currency\":\"usd\",\"customer\":\"x\"}".to_vec();
    let at = body.iter().position(|&b| b == b'x').unwrap();
    body[at] = 0xff;
    let reply = service
        .post("/v1/charges", "k")
        .header("content-type", "application/json")
        .body(body)
        .send()
        .await;
    assert_refused(&reply, "parameter_unreadable", None, "broken UTF-8");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn bad_headers_are_refused(pool: PgPool) {
    let service = Service::start(&pool).await;
    let form = "amount=5000&currency=usd";
    for key in [
        "",
        "\"\"",
        "\"open",
        "two words",
        "schlüssel",
        &"k".repeat(256),
    ] {
        let reply = service.post("/v1/charges", key).form(form).send().await;
        reply.assert_error(400, "idempotency_key_invalid");
    }
    let twice = service
        .post("/v1/charges", "k")
        .header("idempotency-key", "k")
        .form(form)
        .send()
        .await;
    twice.assert_error(400, "idempotency_key_invalid");

    for media_type in [
        "text/plain",
        "application/xml",
        "application/json; charset=latin1",
        "multipart/form-data",
        "",
    ] {
        let reply = service
            .post("/v1/charges", "k")
            .header("content-type", media_type)
            .body(form)
            .send()
            .await;
        reply.assert_error(415, "media_type_unsupported");
    }
    let untyped = service.post("/v1/charges", "k").body(form).send().await;
    untyped.assert_error(415, "media_type_unsupported");
    let nothing = service.post("/v1/charges", "k").send().await;
    assert_refused(
        &nothing,
        "parameter_missing",
        Some("amount"),
        "no body at all",
    );
    let packed = service
        .post("/v1/charges", "k")
        .header("content-encoding", "gzip")
        .form(form)
        .send()
        .await;
    packed.assert_error(415, "media_type_unsupported");

    let query = service
        .post("/v1/charges?amount=1", "k")
        .form(form)
        .send()
        .await;
    assert_refused(
        &query,
        "parameter_unknown",
        Some("amount"),
        "a parameter in the query",
    );

    // A body of unknown length is cut at the limit as well, and the limit itself is fine.
    let endless = axum::body::Body::from_stream(futures::stream::iter(
        (0..70).map(|_| Ok::<_, std::io::Error>(" ".repeat(1024))),
    ));
    let reply = service
        .post("/v1/charges", "k")
        .header("content-type", "application/json")
        .body(endless)
        .send()
        .await;
    reply.assert_error(413, "body_too_large");
    // One that breaks off is not too large.
    let broken = [Ok(" ".to_owned()), Err(std::io::ErrorKind::BrokenPipe)]
        .map(|part| part.map_err(std::io::Error::from));
    let broken = axum::body::Body::from_stream(futures::stream::iter(broken));
    let reply = service
        .post("/v1/charges", "k")
        .header("content-type", "application/json")
        .body(broken)
        .send()
        .await;
    assert_refused(
        &reply,
        "parameter_unreadable",
        None,
        "a body that breaks off",
    );
    let mut full = format!(
        "{{{}\"amount\":5000,\"currency\":\"usd\"}}",
        " ".repeat(65_536)
    );
    full.replace_range(1..=full.len() - 65_536, "");
    assert_eq!(full.len(), 65_536);
    let reply = service
        .post("/v1/charges", "full")
        .header("content-type", "application/json")
        .body(full)
        .send()
        .await;
    assert_eq!(reply.status, 200);
}

/// Two of a header, equal or not: which one counts would be a guess.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_header_about_the_body_is_sent_once(pool: PgPool) {
    let service = Service::start(&pool).await;
    for (name, values) in [
        ("Content-Type", ["application/json", "application/json"]),
        ("Content-Type", ["application/json", "text/plain"]),
        ("Content-Encoding", ["identity", "identity"]),
        ("Content-Encoding", ["identity", "gzip"]),
    ] {
        let mut call = service.post("/v1/charges", "order_1");
        if name == "Content-Encoding" {
            call = call.header("content-type", "application/json");
        }
        for value in values {
            call = call.header(name, value);
        }
        let reply = call.body(r#"{"amount":5000,"currency":"usd"}"#);
        let reply = reply.send().await;
        reply.assert_error(400, "parameter_repeated");
        assert_eq!(reply.value()["error"]["param"], name);
        let message = reply.value()["error"]["message"].to_string();
        assert!(message.contains(name), "{message}");
    }
    assert_eq!(count(&pool, "idempotency_keys").await, 0);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn bad_queries_are_refused(pool: PgPool) {
    let service = Service::start(&pool).await;
    let id = service.charge("order_1").send().await.charge_id();
    for (query, code, param) in [
        ("limit=0", "parameter_invalid_integer", Some("limit")),
        ("limit=101", "parameter_invalid_integer", Some("limit")),
        ("limit=ten", "parameter_invalid_integer", Some("limit")),
        ("limit=", "parameter_invalid_empty", Some("limit")),
        ("limit=1&limit=1", "parameter_repeated", Some("limit")),
        (
            "starting_after=",
            "parameter_invalid_empty",
            Some("starting_after"),
        ),
        ("page=2", "parameter_unknown", Some("page")),
        ("limit=%ff", "parameter_unreadable", None),
    ] {
        assert_refused(
            &service.get(&format!("/v1/charges?{query}")).send().await,
            code,
            param,
            query,
        );
    }
    for after in ["ch_1", "42", "ch_00000000000000000000000000000000"] {
        let reply = service
            .get(&format!("/v1/charges?starting_after={after}"))
            .send()
            .await;
        reply.assert_error(404, "resource_missing");
        assert_eq!(reply.value()["error"]["param"], "starting_after");
    }
    let reply = service
        .get(&format!("/v1/charges/{id}?expand=customer"))
        .send()
        .await;
    assert_refused(
        &reply,
        "parameter_unknown",
        Some("expand"),
        "a parameter of a charge",
    );
    for malformed in [
        "x",
        "ch_",
        &id.to_uppercase(),
        &id.replace("ch_", "re_"),
        "%00",
        "%ff",
        "ch_%f0%9f%92%a9",
    ] {
        service
            .get(&format!("/v1/charges/{malformed}"))
            .send()
            .await
            .assert_error(404, "resource_missing");
    }
}

/// One account's parsing is time that all others wait for.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_request_of_too_many_or_too_deep_values_is_refused_by_its_limit(pool: PgPool) {
    let service = Service::start(&pool).await;
    let post = || service.post("/v1/charges", "order_1");
    let many = |field: &str, separator: &str| {
        let fields = (0..201).map(|i| field.replace('#', &i.to_string()));
        fields.collect::<Vec<_>>().join(separator)
    };
    let json = |body: String| {
        let call = post().header("content-type", "application/json");
        call.body(body)
    };
    let too_many = "more than 200 parameters";
    let too_deep = "deeper than 8 levels";
    for (call, limit) in [
        (post().form(&many("a#[]", "&")), too_many),
        (post().form(&many("metadata[a#]=1", "&")), too_many),
        (json(format!("{{{}}}", many("\"a#\":1", ","))), too_many),
        (
            json(format!(
                "{{\"metadata\":{{{}}}}}",
                many("\"a#\":\"1\"", ",")
            )),
            too_many,
        ),
        (
            json(format!("{{\"expand\":[{}]}}", many("#", ","))),
            too_many,
        ),
        (
            json(format!("{}1{}", "{\"a\":".repeat(9), "}".repeat(9))),
            too_deep,
        ),
        (
            service.get(&format!("/v1/charges?{}", many("a#[]", "&"))),
            too_many,
        ),
        (
            service.get(&format!("/v1/refunds?{}", many("created[a#]=1", "&"))),
            too_many,
        ),
    ] {
        let reply = call.send().await;
        reply.assert_error(400, "parameter_unreadable");
        let detail = reply.value()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(limit), "{detail}");
        assert_eq!(reply.value()["error"]["param"], Value::Null);
    }
    assert_eq!(count(&pool, "idempotency_keys").await, 0);
    // As much as one request can mean.
    let charge = service.charge("order_1").send().await.charge_id();
    let metadata: Vec<_> = (0..50)
        .map(|i| format!("metadata[old{i}]=&metadata[new{i}]=1"))
        .collect();
    let reply = service
        .post(&format!("/v1/charges/{charge}"), "update_1")
        .form(&metadata.join("&"))
        .send()
        .await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn an_account_has_a_limit_of_its_own(pool: PgPool) {
    let settings = Settings {
        rate_limit: 5,
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await;
    let replies = join_all((0..20).map(|i| service.charge(&format!("order_{i}")).send())).await;
    let refused: Vec<_> = replies.iter().filter(|reply| reply.status == 429).collect();
    // At least: one more place comes free every 200 ms.
    assert!((5..=15).contains(&refused.len()), "{}", refused.len());
    for reply in &refused {
        reply.assert_error(429, "rate_limited");
        assert_eq!(reply.headers["retry-after"], "1");
        assert_eq!(reply.headers["stripe-should-retry"], "true");
    }
    // Nothing was claimed for them.
    let made = i64::try_from(20 - refused.len()).unwrap();
    assert_eq!(count(&pool, "idempotency_keys").await, made);
    let other = service.other_account().await;
    assert_eq!(other.charge("order_1").send().await.status, 200);
    tokio::time::sleep(Duration::from_secs(1)).await;
    for i in 0..3 {
        let retry = service.charge(&format!("order_{i}")).send().await;
        assert_eq!(retry.status, 200, "{retry:?}");
    }
}
