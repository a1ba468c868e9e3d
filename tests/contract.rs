//! The description at `/openapi.json` is true: of every operation, its answer
//! and each error that it lists is provoked, and held against it.

use std::collections::BTreeSet;

use payonce::http::{DuplicateGuard, Keyless};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Executor, PgPool};

use crate::support::{Call, Reply, Service, Settings};

/// The description, and what was seen of it.
struct Contract {
    document: Value,
    seen: BTreeSet<(String, String)>,
}

impl Contract {
    async fn of(service: &Service) -> Self {
        let document = service
            .stranger("GET", "/openapi.json")
            .send()
            .await
            .value();
        assert_eq!(document["openapi"], "3.1.0");
        Self {
            document,
            seen: BTreeSet::new(),
        }
    }

    fn operations(&self) -> Vec<&Value> {
        let paths = self.document["paths"].as_object().unwrap();
        paths
            .values()
            .flat_map(|path| path.as_object().unwrap().values())
            .collect()
    }

    /// Holds an answer against the description, and notes what it was.
    #[track_caller]
    fn check(&mut self, operation: &str, reply: &Reply) {
        let described = self
            .operations()
            .into_iter()
            .find(|described| described["operationId"] == operation)
            .unwrap_or_else(|| panic!("{operation} is not described"));
        let status = reply.status.as_str();
        let response = &described["responses"][status];
        assert!(
            response.is_object(),
            "{operation} is not said to give {status}: {reply:?}"
        );
        let content_type = reply.headers["content-type"].to_str().unwrap();
        let content = &response["content"][content_type];
        assert!(content.is_object(), "{operation} {status}: {content_type}");
        for name in response["headers"].as_object().unwrap().keys() {
            let optional = matches!(
                name.as_str(),
                "Idempotent-Replayed" | "Payonce-Duplicate-Of" | "Retry-After"
            );
            assert!(
                optional || reply.headers.contains_key(name),
                "{operation} {status}: {name}"
            );
        }
        let schema = json!({
            "$ref": content["schema"]["$ref"],
            "components": self.document["components"],
        });
        let body = reply.value();
        if let Err(error) = jsonschema::validate(&schema, &body) {
            panic!(
                "{operation} {status}: {error} at {} in {body}",
                error.instance_path()
            );
        }
        let what = if reply.status == 200 {
            "200".to_owned()
        } else {
            let code = reply.error_code();
            assert!(
                content["examples"].get(&code).is_some(),
                "{operation} is not said to give {code}"
            );
            code
        };
        self.seen.insert((operation.to_owned(), what));
    }

    /// All that the description lists.
    fn listed(&self) -> BTreeSet<(String, String)> {
        let mut listed = BTreeSet::new();
        for operation in self.operations() {
            let id = operation["operationId"].as_str().unwrap();
            for (status, response) in operation["responses"].as_object().unwrap() {
                if status == "200" {
                    listed.insert((id.to_owned(), "200".to_owned()));
                    continue;
                }
                for content in response["content"].as_object().unwrap().values() {
                    for code in content["examples"].as_object().unwrap().keys() {
                        listed.insert((id.to_owned(), code.clone()));
                    }
                }
            }
        }
        listed
    }
}

/// What every operation is tried with: its name, method, path, and a body that is
/// in order.
struct Operation {
    id: &'static str,
    path: String,
    body: Option<Value>,
}

impl Operation {
    fn call(&self, service: &Service, key: &str) -> Call {
        match &self.body {
            Some(body) => service.post(&self.path, key).json(body),
            None => service.get(&self.path),
        }
    }

    fn with_query(&self, service: &Service, query: &str) -> Call {
        let path = format!("{}?{query}", self.path);
        match &self.body {
            Some(body) => service.post(&path, "query").json(body),
            None => service.get(&path),
        }
    }

    fn with_body(&self, service: &Service, key: &str, change: &Value) -> Call {
        let mut body = self.body.clone().unwrap();
        for (name, value) in change.as_object().unwrap() {
            match value {
                Value::Null => drop(body.as_object_mut().unwrap().remove(name)),
                value => body[name] = value.clone(),
            }
        }
        service.post(&self.path, key).json(&body)
    }
}

/// On a charge that is authorised, and a refund of another.
async fn operations(service: &Service) -> Vec<Operation> {
    let create = json!({"amount": 5000, "currency": "usd", "customer": "cus_1", "capture": false});
    let charge = service
        .post("/v1/charges", "known")
        .json(&create)
        .send()
        .await
        .charge_id();
    let other = service.charge("other").send().await.charge_id();
    let refund = json!({"charge": other, "amount": 1});
    let made = service
        .post("/v1/refunds", "refunded")
        .json(&refund)
        .send()
        .await
        .charge_id();
    let operation = |id, path: String, body| Operation { id, path, body };
    vec![
        operation("createCharge", "/v1/charges".to_owned(), Some(create)),
        operation("listCharges", "/v1/charges".to_owned(), None),
        operation("retrieveCharge", format!("/v1/charges/{charge}"), None),
        operation(
            "updateCharge",
            format!("/v1/charges/{charge}"),
            Some(json!({"description": "x"})),
        ),
        operation(
            "captureCharge",
            format!("/v1/charges/{charge}/capture"),
            Some(json!({})),
        ),
        operation("createRefund", "/v1/refunds".to_owned(), Some(refund)),
        operation("listRefunds", "/v1/refunds".to_owned(), None),
        operation("retrieveRefund", format!("/v1/refunds/{made}"), None),
        operation(
            "retrieveIdempotencyKey",
            "/v1/idempotency_keys/known".to_owned(),
            None,
        ),
    ]
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn every_answer_is_as_described(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut contract = Contract::of(&service).await;
    let operations = operations(&service).await;
    what_every_operation_can_say(&service, &pool, &operations, &mut contract).await;
    what_changes_can_say(&service, &pool, &operations, &mut contract).await;
    what_parameters_can_be(&service, &operations, &mut contract).await;
    what_charges_can_say(&service, &pool, &operations, &mut contract).await;

    let listed = contract.listed();
    let missing: Vec<_> = listed.difference(&contract.seen).collect();
    assert!(missing.is_empty(), "described, and never seen: {missing:?}");
}

async fn what_every_operation_can_say(
    service: &Service,
    pool: &PgPool,
    operations: &[Operation],
    contract: &mut Contract,
) {
    let limited = service.replica_with(Settings {
        rate_limit: 1,
        ..Settings::default()
    });
    for operation in operations {
        let id = operation.id;
        let done = operation.call(service, &format!("{id}_done")).send().await;
        contract.check(id, &done);
        let method = if operation.body.is_some() {
            "POST"
        } else {
            "GET"
        };
        contract.check(id, &service.stranger(method, &operation.path).send().await);
        for query in ["nonsense=1", "limit=1&limit=1", "%ff=1"] {
            contract.check(id, &operation.with_query(service, query).send().await);
        }
        operation
            .call(&limited, &format!("{id}_limit"))
            .send()
            .await;
        let limit = operation
            .call(&limited, &format!("{id}_limit"))
            .send()
            .await;
        contract.check(id, &limit);
    }
    // A row that no release of ours wrote, or a statement that is refused: a bug.
    for (breaks, mends) in [
        (
            "alter table charges drop constraint charges_currency_form; update charges set currency = '?';
             update refunds set currency = '?'; alter table idempotency_keys alter created_at type text",
            "update charges set currency = 'usd'; update refunds set currency = 'usd';
             alter table idempotency_keys alter created_at type timestamptz using created_at::timestamptz",
        ),
        (
            "alter table idempotency_keys add constraint no_more check (created_at < '2000-01-01') not valid",
            "alter table idempotency_keys drop constraint no_more",
        ),
    ] {
        pool.execute(AssertSqlSafe(breaks)).await.unwrap();
        for operation in operations {
            let fresh = service.replica();
            let reply = operation.call(&fresh, &format!("{}_bug", operation.id)).send().await;
            if reply.status == 500 {
                contract.check(operation.id, &reply);
            }
        }
        pool.execute(AssertSqlSafe(mends)).await.unwrap();
    }
    let away =
        "alter table charges rename to charges_away; alter table refunds rename to refunds_away;
                alter table idempotency_keys rename to idempotency_keys_away";
    pool.execute(away).await.unwrap();
    for operation in operations {
        let reply = operation
            .call(service, &format!("{}_away", operation.id))
            .send()
            .await;
        reply.assert_error(503, "unavailable");
        contract.check(operation.id, &reply);
    }
    let back =
        "alter table charges_away rename to charges; alter table refunds_away rename to refunds;
                alter table idempotency_keys_away rename to idempotency_keys";
    pool.execute(back).await.unwrap();
}

async fn what_changes_can_say(
    service: &Service,
    pool: &PgPool,
    operations: &[Operation],
    contract: &mut Contract,
) {
    let keyless = service.replica_with(Settings {
        keyless: Keyless::Fingerprint,
        ..Settings::default()
    });
    for operation in operations
        .iter()
        .filter(|operation| operation.body.is_some())
    {
        let id = operation.id;
        let large = "x".repeat(65 * 1024);
        let large = operation.with_body(service, "large", &json!({"description": large}));
        contract.check(id, &large.send().await);
        let plain = service
            .post(&operation.path, "plain")
            .header("content-type", "text/plain");
        contract.check(id, &plain.body("x").send().await);
        let json = |call: Call| call.json(operation.body.as_ref().unwrap());
        let no_key = json(service.call("POST", &operation.path));
        contract.check(id, &no_key.send().await);
        let bad_key = json(service.post(&operation.path, "two words"));
        contract.check(id, &bad_key.send().await);
        let wrong = operation.with_body(
            service,
            "wrong",
            &json!({"description": 1, "metadata": 1, "currency": "?", "reason": 1}),
        );
        contract.check(id, &wrong.send().await);

        let other = operation.call(service, "known");
        let reused = if id == "createCharge" {
            operation.with_body(service, "known", &json!({"amount": 1}))
        } else {
            other
        };
        contract.check(id, &reused.send().await);
        let as_stripe = if id == "createCharge" {
            operation.with_body(service, "known", &json!({"amount": 1}))
        } else {
            operation.call(service, "known")
        };
        let as_stripe = as_stripe
            .header("stripe-version", "2026-01-01")
            .send()
            .await;
        as_stripe.assert_error(400, "idempotency_key_reused");
        contract.check(id, &as_stripe);

        let placeholder = format!(
            "insert into idempotency_keys (account_id, key, request_hash, operation_id, request_id, created_at, expires_at)
             values ('{}', 'held_{id}', decode(repeat('01', 33), 'hex'), gen_random_uuid(), gen_random_uuid(), now(), now())",
            service.account_id.0
        );
        pool.execute(AssertSqlSafe(placeholder)).await.unwrap();
        let held = operation
            .call(service, &format!("held_{id}"))
            .header("prefer", "wait=0");
        contract.check(id, &held.send().await);

        for _ in 0..2 {
            let reply = json(keyless.call("POST", &operation.path)).send().await;
            contract.check(id, &reply);
        }
    }
}

/// Parameters one by one, where an operation has them.
async fn what_parameters_can_be(
    service: &Service,
    operations: &[Operation],
    contract: &mut Contract,
) {
    let nobody = "ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e";
    for operation in operations {
        let id = operation.id;
        let bodies: &[Value] = match id {
            "createCharge" => &[
                json!({"amount": null}),
                json!({"currency": ""}),
                json!({"amount": "5"}),
            ],
            "captureCharge" => &[json!({"amount": 0}), json!({"nonsense": 1})],
            "createRefund" => &[
                json!({"charge": null}),
                json!({"charge": ""}),
                json!({"amount": 0}),
                json!({"charge": nobody}),
            ],
            _ => &[],
        };
        for (i, change) in bodies.iter().enumerate() {
            let reply = operation
                .with_body(service, &format!("{id}_{i}"), change)
                .send()
                .await;
            contract.check(id, &reply);
        }
        let queries: &[&str] = match id {
            "listCharges" => &[
                "customer=",
                "limit=0",
                "limit[a]=1",
                "starting_after=ch_1",
                "starting_after=x&ending_before=y",
            ],
            "listRefunds" => &["charge=", "limit=0", "charge=x", "starting_after=re_1"],
            _ => &[],
        };
        for query in queries {
            contract.check(id, &operation.with_query(service, query).send().await);
        }
        // As a form, an empty number.
        if id == "captureCharge" {
            let empty = service.post(&operation.path, "empty").form("amount=");
            contract.check(id, &empty.send().await);
        }
        let missing = match id {
            "retrieveCharge" | "updateCharge" => Some(format!("/v1/charges/{nobody}")),
            "captureCharge" => Some(format!("/v1/charges/{nobody}/capture")),
            "retrieveRefund" => Some("/v1/refunds/re_1".to_owned()),
            "retrieveIdempotencyKey" => Some("/v1/idempotency_keys/nobody".to_owned()),
            _ => None,
        };
        if let Some(path) = missing {
            let elsewhere = Operation {
                path,
                body: operation.body.clone(),
                ..*operation
            };
            contract.check(
                id,
                &elsewhere
                    .call(service, &format!("{id}_missing"))
                    .send()
                    .await,
            );
        }
    }
}

/// What depends on what became of a charge before.
async fn what_charges_can_say(
    service: &Service,
    pool: &PgPool,
    operations: &[Operation],
    contract: &mut Contract,
) {
    let create = operations
        .iter()
        .find(|operation| operation.id == "createCharge")
        .unwrap();
    for token in [
        "tok_chargeDeclined",
        "tok_chargeDeclinedExpiredCard",
        "tok_chargeDeclinedIncorrectCvc",
        "tok_chargeDeclinedProcessingError",
    ] {
        let reply = create
            .with_body(service, token, &json!({"source": token}))
            .send()
            .await;
        contract.check("createCharge", &reply);
    }
    let guarded = service.replica_with(Settings {
        duplicate_guard: DuplicateGuard::Refuse,
        ..Settings::default()
    });
    for key in ["guarded_1", "guarded_2"] {
        contract.check("createCharge", &create.call(&guarded, key).send().await);
    }

    let charge = async |key: &str, change: &Value| {
        let reply = create.with_body(service, key, change).send().await;
        let body = reply.value();
        let id = body["id"].as_str().or(body["error"]["charge"].as_str());
        id.unwrap().to_owned()
    };
    let authorised = charge("authorised", &json!({})).await;
    let cancelled = charge("cancelled", &json!({})).await;
    let failed = charge("failed", &json!({"source": "tok_chargeDeclined"})).await;
    let taken = charge("taken", &json!({"capture": true})).await;
    let mut key = 0;
    for (id, of, body) in [
        ("createRefund", &authorised, json!({"amount": 1})),
        ("createRefund", &cancelled, json!({})),
        ("createRefund", &cancelled, json!({})),
        ("createRefund", &failed, json!({})),
        ("createRefund", &taken, json!({"amount": 5001})),
        ("captureCharge", &authorised, json!({"amount": 5001})),
        ("captureCharge", &taken, json!({})),
        ("captureCharge", &cancelled, json!({})),
        ("captureCharge", &failed, json!({})),
    ] {
        key += 1;
        let mut body = body;
        let path = if id == "createRefund" {
            body["charge"] = json!(of);
            "/v1/refunds".to_owned()
        } else {
            format!("/v1/charges/{of}/capture")
        };
        let call = service.post(&path, &format!("change_{key}")).json(&body);
        contract.check(id, &call.send().await);
    }
    for half in 0..2 {
        let names: serde_json::Map<_, _> = (0..30)
            .map(|i| (format!("n{half}_{i}"), json!("v")))
            .collect();
        let call = service.post(&format!("/v1/charges/{taken}"), &format!("full_{half}"));
        let reply = call.json(&json!({"metadata": names})).send().await;
        contract.check("updateCharge", &reply);
    }
    // So that nothing here went by the wrong account or an empty table.
    assert!(crate::support::count(pool, "charges").await > 10);
}

/// Whether the description allows this value.
fn allows(document: &Value, schema: &Value, value: &Value) -> bool {
    let mut schema = schema.clone();
    schema["components"] = document["components"].clone();
    jsonschema::is_valid(&schema, value)
}

/// The bracketed form of an object, as OpenAPI's `deepObject` writes it.
fn deep_object(body: &Value, encoding: &Value) -> String {
    let mut pairs = Vec::new();
    for (name, value) in body.as_object().unwrap() {
        let Value::Object(inner) = value else {
            let text = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            pairs.push(format!("{name}={}", text.replace(' ', "+")));
            continue;
        };
        let how = &encoding[name];
        assert_eq!(how["style"], "deepObject", "{name} in a form");
        assert_eq!(how["explode"], true, "{name} in a form");
        for (key, value) in inner {
            pairs.push(format!("{name}[{key}]={}", value.as_str().unwrap()));
        }
    }
    pairs.join("&")
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn every_example_is_as_described(pool: PgPool) {
    let service = Service::start(&pool).await;
    let contract = Contract::of(&service).await;
    let mut seen = 0;
    for operation in contract.operations() {
        let responses = operation["responses"].as_object().unwrap().values();
        for described in responses.chain(operation.get("requestBody")) {
            for content in described["content"].as_object().unwrap().values() {
                let named = content["examples"].as_object();
                let examples = named
                    .into_iter()
                    .flat_map(|named| named.values().map(|example| &example["value"]))
                    .chain(content.get("example"));
                for example in examples {
                    let id = &operation["operationId"];
                    assert!(
                        allows(&contract.document, &content["schema"], example),
                        "{id}: {example}"
                    );
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 100, "{seen}");
}

/// Whoever tries a POST on the page with what stands there.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_first_try_works(pool: PgPool) {
    let service = Service::start(&pool).await;
    let contract = Contract::of(&service).await;
    let mut keys = BTreeSet::new();
    let paths = contract.document["paths"].as_object().unwrap();
    for operation in paths.values().filter_map(|path| path.get("post")) {
        let first = &operation["parameters"][0];
        assert_eq!(first["name"], "Idempotency-Key");
        assert_eq!(first["required"], true);
        assert!(
            first["description"].as_str().unwrap().contains("KEYLESS"),
            "where it is not required"
        );
        let key = first["example"].as_str().unwrap();
        assert!(allows(
            &contract.document,
            &first["schema"],
            &first["example"]
        ));
        assert!(keys.insert(key), "{key} is another operation's");
    }
    let create = &paths["/v1/charges"]["post"];
    let key = create["parameters"][0]["example"].as_str().unwrap();
    let content = &create["requestBody"]["content"];
    let json = &content["application/json"];
    let tried = service.post("/v1/charges", key).json(&json["example"]);
    let tried = tried.send().await;
    assert_eq!(tried.status, 200, "{tried:?}");
    // As a form it is the same request.
    let form = &content["application/x-www-form-urlencoded"];
    let form = deep_object(&form["example"], &form["encoding"]);
    let again = service.post("/v1/charges", key).form(&form).send().await;
    assert!(again.is_replayed(), "{again:?}");
    assert_eq!(again.body, tried.body);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_key_is_taken_where_its_description_allows_it(pool: PgPool) {
    let service = Service::start(&pool).await;
    let contract = Contract::of(&service).await;
    let schema = &contract.document["paths"]["/v1/charges"]["post"]["parameters"][0]["schema"];
    let (long, longer) = ("k".repeat(255), "k".repeat(256));
    let escaped = format!("\"{}\"", "\\\"".repeat(255));
    for key in [
        "k",
        "order_1",
        "\"order_2\"",
        "a\"b",
        "\"a\\\\b\"",
        &long,
        &longer,
        &escaped,
        &format!("\"{longer}\""),
        "two words",
        "\"",
        "\"\"",
        "\"a",
        "\"a\"b\"",
        "\"a\\b\"",
        "é",
    ] {
        let reply = service.charge(key).send().await;
        assert_eq!(
            reply.status == 200,
            allows(&contract.document, schema, &json!(key)),
            "{key}: {reply:?}"
        );
    }
}

/// What a field of a request is tried with: at its limits, and beyond.
fn values_of(field: &str, charge: &str) -> Vec<Value> {
    let long = |length: usize| json!("x".repeat(length));
    let names = |count: usize| -> Value {
        (0..count)
            .map(|i| (format!("n{i}"), json!("v")))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let entry = |name: &str, text: &str| json!({ name: text });
    match field {
        "amount" => [0, 1, 999_999_999_999, 1_000_000_000_000_i64]
            .map(Value::from)
            .to_vec(),
        "customer" | "source" => vec![long(0), long(255), long(256)],
        "description" => vec![long(0), long(1000), long(1001)],
        "metadata" => vec![
            json!(""),
            json!("x"),
            json!({"a": null}),
            json!({"a": ""}),
            json!({"": "v"}),
            names(50),
            names(51),
            entry(&"n".repeat(40), "v"),
            entry(&"n".repeat(41), "v"),
            entry("a[b]", "v"),
            entry("n", &"v".repeat(500)),
            entry("n", &"v".repeat(501)),
        ],
        "currency" => ["usd", "USD", "us", "usdd"].map(Value::from).to_vec(),
        "charge" => vec![json!(charge), json!("ch_1")],
        "reason" => ["fraudulent", "other"].map(Value::from).to_vec(),
        "capture" => vec![json!(true), json!("true")],
        other => panic!("{other} has limits that nobody tries"),
    }
}

/// What is sent at a limit is taken, and what is beyond it, or null where none is
/// allowed, is refused by its name.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn limits_and_nulls_are_as_described(pool: PgPool) {
    let service = Service::start(&pool).await;
    let contract = Contract::of(&service).await;
    let document = &contract.document;
    let charge = service
        .post("/v1/charges", "authorised")
        .json(&json!({"amount": 5000, "currency": "usd", "capture": false}))
        .send()
        .await
        .charge_id();
    let mut limits = BTreeSet::new();
    for operation in operations(&service).await {
        let Some(body) = &operation.body else {
            continue;
        };
        let schema = contract
            .operations()
            .into_iter()
            .find(|described| described["operationId"] == operation.id)
            .map(|described| &described["requestBody"]["content"]["application/json"]["schema"])
            .unwrap();
        let at = schema["$ref"].as_str().unwrap().trim_start_matches('#');
        let fields = document.pointer(at).unwrap()["properties"]
            .as_object()
            .unwrap();
        for field in fields.keys() {
            let values = [vec![Value::Null], values_of(field, &charge)].concat();
            for (i, value) in values.iter().enumerate() {
                let mut sent = body.clone();
                sent[field] = value.clone();
                let key = format!("{}_{field}_{i}", operation.id);
                let reply = service.post(&operation.path, &key).json(&sent).send().await;
                let refused = reply.status == 400
                    && reply.error_code().starts_with("parameter_")
                    // That a token is none of Stripe's is not a question of form.
                    && !(field == "source" && reply.body.contains("test tokens"));
                let allowed = allows(document, schema, &sent);
                assert_eq!(!refused, allowed, "{key}: {value} {reply:?}");
                if refused {
                    let param = reply.value()["error"]["param"].to_string();
                    assert!(param.contains(field.as_str()), "{key}: {param}");
                }
                limits.insert((operation.id, allowed));
            }
        }
    }
    assert_eq!(limits.len(), 8, "allowed and refused, of four operations");
}

/// A list takes what is described of its parameters, and nothing beyond.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn parameters_of_lists_are_as_described(pool: PgPool) {
    let service = Service::start(&pool).await;
    let contract = Contract::of(&service).await;
    let charge = service.charge("order_1").send().await.charge_id();
    let refund = service
        .post("/v1/refunds", "refund_1")
        .json(&json!({"charge": charge, "amount": 1}));
    let refund = refund.send().await.charge_id();
    for (path, cursor) in [("/v1/charges", charge), ("/v1/refunds", refund)] {
        let list = &contract.document["paths"][path]["get"];
        let described = list["description"].as_str().unwrap();
        for said in [
            "`ending_before`",
            "`created[gte]`",
            "60 seconds",
            "feed of events",
        ] {
            assert!(described.contains(said), "{path}: {said}");
        }
        let parameters = list["parameters"].as_array().unwrap();
        let mut tried = BTreeSet::new();
        for (name, inner, values) in [
            ("limit", None, ["0", "1", "100", "101"]),
            ("created", None, ["-1", "0", "253402300799", "253402300800"]),
            (
                "created",
                Some("gte"),
                ["-1", "0", "253402300799", "253402300800"],
            ),
            (
                "created",
                Some("gt"),
                ["-1", "0", "253402300799", "253402300800"],
            ),
            (
                "created",
                Some("lte"),
                ["-1", "0", "253402300799", "253402300800"],
            ),
            (
                "created",
                Some("lt"),
                ["-1", "0", "253402300799", "253402300800"],
            ),
            (
                "created",
                Some("near"),
                ["-1", "0", "253402300799", "253402300800"],
            ),
            ("starting_after", None, [&*cursor, "x", "ch_", "re_"]),
            ("ending_before", None, [&*cursor, "x", "ch_", "re_"]),
        ] {
            let parameter = parameters
                .iter()
                .find(|parameter| parameter["name"] == name)
                .unwrap_or_else(|| panic!("{path} does not tell of {name}"));
            tried.insert(name);
            for value in values {
                let typed = value.parse::<i64>().map_or(json!(value), Value::from);
                let (query, sent) = match inner {
                    None => (format!("{name}={value}"), typed),
                    Some(inner) => {
                        assert_eq!(parameter["style"], "deepObject");
                        assert_eq!(parameter["explode"], true);
                        (format!("{name}[{inner}]={value}"), json!({ inner: typed }))
                    }
                };
                let reply = service.get(&format!("{path}?{query}")).send().await;
                assert_eq!(
                    reply.status == 200,
                    allows(&contract.document, &parameter["schema"], &sent),
                    "{path}?{query}: {reply:?}"
                );
            }
        }
        let others: Vec<_> = parameters
            .iter()
            .map(|parameter| parameter["name"].as_str().unwrap())
            .filter(|name| !tried.contains(name))
            .collect();
        assert!(others == ["customer"] || others == ["charge"], "{others:?}");
    }
}

/// How the description says to poll: what is committed late is missed by
/// `ending_before`, and found by the overlap.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn polling_with_an_overlap_finds_what_commits_late(pool: PgPool) {
    let service = Service::start(&pool).await;
    let first = service.charge("first").send().await.charge_id();
    // Its id is given out now, and its transaction commits after the next one's.
    let late = crate::support::command(service.account_id, "late");
    let newest = service.charge("newest").send().await.value();
    let mut conn = pool.acquire().await.unwrap();
    payonce::charges::claim_and_insert(&mut conn, &[&late])
        .await
        .unwrap();
    let late = late.charge.id.to_string();

    let ids = async |query: String| -> BTreeSet<String> {
        let page = service.get(&format!("/v1/charges?{query}")).send().await;
        let page = page.value();
        let charges = page["data"].as_array().unwrap().iter();
        charges
            .map(|charge| charge["id"].as_str().unwrap().to_owned())
            .collect()
    };
    let id = newest["id"].as_str().unwrap();
    assert!(!ids(format!("ending_before={id}")).await.contains(&late));
    let since = newest["created"].as_i64().unwrap() - 60;
    let polled = ids(format!("created[gte]={since}&limit=100")).await;
    assert_eq!(polled, BTreeSet::from([first, late, id.to_owned()]));
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_page_comes_from_the_binary(pool: PgPool) {
    let service = Service::start(&pool).await;
    let page = service.stranger("GET", "/docs/").send().await;
    assert_eq!(page.status, 200);
    for (_, rest) in page
        .body
        .match_indices("src=\"")
        .map(|(at, _)| page.body.split_at(at + 5))
    {
        let path = rest.split('"').next().unwrap();
        assert!(path.starts_with("./"), "{path} is loaded from elsewhere");
        let asset = service
            .stranger("GET", &format!("/docs/{}", &path[2..]))
            .send()
            .await;
        assert_eq!(asset.status, 200, "{path}");
        if path.ends_with("initializer.js") {
            assert!(asset.body.contains("/openapi.json"), "{}", asset.body);
        }
    }
    assert!(page.body.contains("<title>payonce"), "{}", page.body);
    for path in ["/docs/nothing.js", "/docs/%ff", "/docs/a/%ff"] {
        let reply = service.stranger("GET", path).send().await;
        reply.assert_error(404, "route_unknown");
        assert_eq!(reply.headers["content-type"], "application/problem+json");
    }
}

/// An API key is typed into it, so nobody else's code, frame or form comes near.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_pages_take_nothing_from_elsewhere(pool: PgPool) {
    let service = Service::start(&pool).await;
    for path in [
        "/",
        "/docs/",
        "/docs/index.html",
        "/docs/swagger-ui-bundle.js",
    ] {
        let page = service.stranger("GET", path).send().await;
        assert_eq!(page.status, 200, "{path}");
        let policy = page.headers["content-security-policy"].to_str().unwrap();
        for part in [
            "default-src 'none'",
            "connect-src 'self'",
            "frame-ancestors 'none'",
        ] {
            assert!(policy.contains(part), "{path}: {policy}");
        }
        for loose in ["unsafe", "http", "*"] {
            assert!(!policy.contains(loose), "{path}: {policy}");
        }
        assert_eq!(page.headers["x-frame-options"], "DENY");
        assert_eq!(page.headers["referrer-policy"], "no-referrer");
    }
    // Its default is a validator on the Internet, wherever the page is not on
    // localhost.
    let config = service
        .stranger("GET", "/docs/swagger-initializer.js")
        .send()
        .await;
    assert!(
        config.body.contains("\"validatorUrl\": \"none\""),
        "{}",
        config.body
    );
    for path in [
        "/docs/",
        "/openapi.json",
        "/healthz",
        "/v1/nothing",
        "/errors/internal",
    ] {
        let reply = service.stranger("GET", path).send().await;
        assert_eq!(reply.headers["x-content-type-options"], "nosniff", "{path}");
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_address_itself_says_where_to_go(pool: PgPool) {
    let service = Service::start(&pool).await;
    let index = service.stranger("GET", "/").send().await;
    assert_eq!(index.status, 200);
    assert_eq!(index.headers["content-type"], "text/html; charset=utf-8");
    let links: Vec<_> = index
        .body
        .split("href=\"")
        .skip(1)
        .map(|rest| format!("/{}", rest.split('"').next().unwrap()))
        .collect();
    assert_eq!(links, ["/docs/", "/openapi.json", "/healthz", "/readyz"]);
    for link in links {
        let reply = service.stranger("GET", &link).send().await;
        assert_eq!(reply.status, 200, "{link}");
    }
}
