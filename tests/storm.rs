//! The storm finds nothing at payonce, and finds the guilty elsewhere: a small
//! server with one fault each has to be caught by the count of that fault.

use std::{
    collections::BTreeMap,
    process::Stdio,
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    extract::{OriginalUri, Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpListener,
    process::{Child, Command},
    sync::Notify,
};

use crate::support::{
    count, eventually, make_account,
    process::{BINARY, Process, Signal, send_signal},
};

/// Runs it with `--json`, and gives exit code, report and standard error.
async fn storm(api_key: &str, arguments: &[&str]) -> (i32, Value, String) {
    let output = Command::new(BINARY)
        .args(["storm", "--json"])
        .args(arguments)
        .env("PAYONCE_API_KEY", api_key)
        .env_remove("PAYONCE_URL")
        // Of no account to the storm, which asks the tables only when told to.
        .env("DATABASE_URL", "postgres://nobody@127.0.0.1:1/nowhere")
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("standard output is not one JSON object: {error}\n{said}"));
    (output.status.code().unwrap(), report, said)
}

fn counts(report: &Value) -> [u64; 4] {
    [
        "double_charges",
        "lost_charges",
        "differing_answers",
        "unanswered_keys",
    ]
    .map(|count| {
        report[count]
            .as_u64()
            .unwrap_or_else(|| panic!("{count} is no number"))
    })
}

/// What was found of captures and refunds, without what was not.
fn changes(report: &Value) -> BTreeMap<&'static str, u64> {
    CHANGES
        .into_iter()
        .map(|count| (count, report[count].as_u64().unwrap()))
        .filter(|(_, count)| *count > 0)
        .collect()
}

const CHANGES: [&str; 8] = [
    "double_captures",
    "captures_beyond_amount",
    "lost_captures",
    "double_refunds",
    "refunds_beyond_captured",
    "lost_refunds",
    "refunds_not_adding_up",
    "wrong_refusals",
];

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn payonce_stands_the_storm(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let url = pool.connect_options().to_url_lossy().to_string();
    let (one, other) = (Process::serve(&url).await, Process::serve(&url).await);
    let (one, other) = (
        format!("http://{}", one.address),
        format!("http://{}/", other.address),
    );
    let history =
        std::env::temp_dir().join(format!("payonce-history-{}.jsonl", std::process::id()));
    let arguments = [
        "--target",
        &one,
        "--target",
        &other,
        "--customers",
        "300",
        "--seed",
        "7",
        "--cut",
        "0.3",
        "--duplicate",
        "0.2",
        "--changes",
        "0.5",
        "--database-url",
        &url,
        "--history",
        history.to_str().unwrap(),
    ];
    let (code, report, said) = storm(&api_key, &arguments).await;
    assert_eq!(counts(&report), [0; 4], "{report}");
    assert_eq!(changes(&report), BTreeMap::new(), "{report}");
    assert_eq!(code, 0, "{said}");
    assert_eq!(report["table_findings"], json!([]));
    assert_eq!(report["charges_made"], 300);
    for done in ["captures_made", "refunds_made", "changes_refused"] {
        assert!(report[done].as_u64().unwrap() > 50, "{report}");
    }
    assert!(
        report["answers_by_status"].get("400 undeserved").is_none(),
        "{report}"
    );
    assert!(
        report["without_keys"]["customers_charged_twice"]
            .as_u64()
            .unwrap()
            > 50,
        "it was no storm: {report}"
    );
    for fate in [
        "delayed",
        "dropped",
        "answer_lost",
        "hung_up",
        "bad_gateway",
        "duplicated",
    ] {
        assert!(
            report["requests_by_fate"][fate].as_u64().unwrap() > 0,
            "no request was {fate}"
        );
    }
    assert!(said.contains("seed 7"));
    assert!(
        said.trim_end()
            .lines()
            .last()
            .unwrap()
            .starts_with("storm: nothing wrong: 300 customers"),
        "{said}"
    );
    let lines = std::fs::read_to_string(&history).unwrap();
    std::fs::remove_file(&history).unwrap();
    assert!(
        lines.lines().count() >= 900,
        "each key was asked for at least three times"
    );

    for kind in ["charge", "capture", "refund"] {
        let of_kind = format!(r#""kind":"{kind}""#);
        assert!(lines.contains(&of_kind), "the history has no {kind}");
    }
    let reads = lines.lines().filter(|l| l.contains(r#""line":"read""#));
    assert_eq!(
        reads.count() as u64,
        report["customers_with_changes"].as_u64().unwrap()
    );

    // Another run of the same seed meets a deployment that remembers the first.
    let (code, again, _) = storm(&api_key, &arguments[..8]).await;
    assert_eq!((code, counts(&again)), (0, [0; 4]));
    assert_eq!(again["charges_made"], 300);
    assert_ne!(again["mark"], report["mark"]);
    assert!(again.get("table_findings").is_none());
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_tables_are_audited_too(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let url = pool.connect_options().to_url_lossy().to_string();
    let service = Process::serve(&url).await;
    let target = format!("http://{}", service.address);
    // What the API cannot show: a charge that is not what its answer says.
    sqlx::raw_sql(
        "create function skim() returns trigger language plpgsql as
             $$ begin new.amount := new.amount + 1; return new; end $$;
         create trigger skim before insert on charges for each row execute function skim()",
    )
    .execute(&pool)
    .await
    .unwrap();
    let (code, report, said) = storm(
        &api_key,
        &[
            "--target",
            &target,
            "--customers",
            "20",
            "--database-url",
            &url,
        ],
    )
    .await;
    assert_eq!(code, 1);
    assert!(said.contains("findings in the tables"), "{said}");
    assert!(
        report["table_findings"].as_array().unwrap().len() >= 15,
        "{report}"
    );
}

/// What is acknowledged in a charge and its refunds, and then changed behind the
/// service's back, so that only the tables can tell.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_tables_of_captures_and_refunds_are_audited_too(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let url = pool.connect_options().to_url_lossy().to_string();
    let service = Process::serve(&url).await;
    let target = format!("http://{}", service.address);
    let arguments = [
        "--target",
        &target,
        "--customers",
        "60",
        "--seed",
        "7",
        "--changes",
        "1",
        "--database-url",
        &url,
    ];
    // It takes a unit of each refund to itself, and of each capture.
    sqlx::raw_sql(
        "alter table charges drop constraint charges_refunded_within_captured;
         create function skim_refund() returns trigger language plpgsql as $$ begin
             new.amount := new.amount + 1; return new; end $$;
         create trigger skim before insert on refunds for each row execute function skim_refund();
         create function skim_capture() returns trigger language plpgsql as $$ begin
             if old.amount_captured = 0 and new.amount_captured > 1 then
                 new.amount_captured := new.amount_captured - 1;
             end if;
             return new;
         end $$;
         create trigger skim before update on charges for each row execute function skim_capture()",
    )
    .execute(&pool)
    .await
    .unwrap();
    let (code, report, _) = storm(&api_key, &arguments).await;
    assert_eq!(code, 1);
    let found: Vec<_> = report["table_findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|finding| finding.as_str().unwrap())
        .collect();
    for finding in [
        "an answer that is not its refund's under the key storm-",
        "the refunds are not the amount refunded of the charge ch_",
        "an answer that is not its charge's under the key storm-",
        "an acknowledged capture is not in the charge ch_",
    ] {
        let times = found.iter().filter(|f| f.starts_with(finding)).count();
        assert!(times >= 5, "{finding}: {found:#?}");
    }

    // The row of a refund goes, and the row of a charge.
    sqlx::raw_sql(
        "drop trigger skim on refunds; drop trigger skim on charges;
         create function lose() returns trigger language plpgsql as $$ begin return null; end $$;
         create trigger lose before insert on refunds for each row execute function lose()",
    )
    .execute(&pool)
    .await
    .unwrap();
    let (code, report, _) = storm(&api_key, &arguments).await;
    assert_eq!(code, 1);
    assert!(changes(&report)["lost_refunds"] >= 20, "{report}");
    for finding in [
        "an acknowledged refund is not there: re_",
        "an answer without its refund under the key storm-",
    ] {
        assert!(report.to_string().contains(finding), "{report}");
    }
}

/// What is wrong with a server.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Fault {
    Nothing,
    ChargesForEveryRequest,
    ForgetsCharges,
    AnswersDifferently,
    NeverAnswers,
    /// Of captures and refunds:
    RefundsForEveryRequest,
    RefundsTwice,
    RefundsMoreThanIsLeft,
    LosesRefunds,
    MiscountsRefunds,
    RefusesRefunds,
    CapturesTwice,
    CapturesMoreThanTheAmount,
    LosesCaptures,
    TellsChangesDifferently,
    NeverAnswersChanges,
    /// No fault where answers expire: captures are forgotten, and a charge is told
    /// as it stands.
    Forgets,
}

#[derive(Clone)]
struct Guilty {
    fault: Fault,
    books: Arc<Mutex<Books>>,
}

#[derive(Default)]
struct Books {
    /// Key and answer; newest last.
    charges: Vec<(String, Value)>,
    /// As they stand now.
    present: BTreeMap<String, Value>,
    refunds: Vec<Value>,
    /// Of captures and refunds, by key.
    changes: BTreeMap<String, Change>,
    /// How many of them were told differently.
    told_differently: u32,
    /// Whether it answers nothing any more, whatever its fault.
    hushed: bool,
}

struct Change {
    path: String,
    request: Value,
    status: StatusCode,
    answer: Value,
}

fn charge(
    State(guilty): State<Guilty>,
    headers: &HeaderMap,
    Json(request): Json<Value>,
) -> Response {
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let mut books = guilty.books.lock().unwrap();
    if books.hushed || guilty.fault == Fault::NeverAnswers {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if guilty.fault != Fault::ChargesForEveryRequest
        && let Some((_, first)) = books.charges.iter().find(|(used, _)| *used == key)
    {
        let mut answer = first.clone();
        if guilty.fault == Fault::Forgets {
            answer = books.present[answer["id"].as_str().unwrap()].clone();
        }
        if guilty.fault == Fault::AnswersDifferently {
            answer["description"] = json!("told again");
        }
        return ([("idempotent-replayed", "true")], Json(answer)).into_response();
    }
    let (id, amount) = (format!("ch_{}", books.charges.len()), &request["amount"]);
    let captured = request["capture"] != false;
    let answer = json!({
        "id": id, "object": "charge", "created": books.charges.len(),
        "amount": amount, "amount_captured": if captured { amount.clone() } else { json!(0) },
        "amount_refunded": 0, "captured": captured, "refunded": false,
        "customer": request["customer"], "status": "succeeded",
    });
    books.charges.push((key, answer.clone()));
    books.present.insert(id, answer.clone());
    Json(answer).into_response()
}

/// Captures and refunds, under keys that are kept but for the fault's sake.
async fn change(
    State(guilty): State<Guilty>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
    Json(request): Json<Value>,
) -> Response {
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let mut books = guilty.books.lock().unwrap();
    if books.hushed || guilty.fault == Fault::NeverAnswersChanges {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let forgets = match guilty.fault {
        Fault::RefundsForEveryRequest => uri.path() == "/v1/refunds",
        Fault::Forgets => uri.path() != "/v1/refunds",
        _ => false,
    };
    if !forgets && let Some(first) = books.changes.get(&key) {
        if (first.path.as_str(), &first.request) != (uri.path(), &request) {
            return StatusCode::UNPROCESSABLE_ENTITY.into_response();
        }
        let (status, mut answer) = (first.status, first.answer.clone());
        if guilty.fault == Fault::TellsChangesDifferently {
            answer["description"] = json!("told again");
            books.told_differently += 1;
        }
        return (status, [("idempotent-replayed", "true")], Json(answer)).into_response();
    }
    let answer = match uri.path().strip_suffix("/capture") {
        Some(path) => {
            let id = path.rsplit('/').next().unwrap();
            books.capture(guilty.fault, id, &request)
        }
        None => books.refund(guilty.fault, &request),
    };
    let (status, answer) = match answer {
        Ok(body) => (StatusCode::OK, body),
        Err(code) => (
            StatusCode::BAD_REQUEST,
            json!({ "error": { "code": code } }),
        ),
    };
    let done = Change {
        path: uri.path().to_owned(),
        request,
        status,
        answer: answer.clone(),
    };
    books.changes.insert(key, done);
    (status, Json(answer)).into_response()
}

impl Books {
    fn capture(&mut self, fault: Fault, id: &str, request: &Value) -> Result<Value, &'static str> {
        let charge = self.present.get_mut(id).unwrap();
        let whole = charge["amount"].as_i64().unwrap();
        let amount = request["amount"].as_i64().unwrap_or(whole);
        if charge["captured"] == true && fault != Fault::CapturesTwice {
            return Err("charge_already_captured");
        }
        if charge["amount_refunded"] != 0 {
            return Err("charge_already_refunded");
        }
        if amount > whole && fault != Fault::CapturesMoreThanTheAmount {
            return Err("amount_too_large");
        }
        let mut answer = charge.clone();
        answer["captured"] = json!(true);
        answer["amount_captured"] = json!(amount);
        if fault != Fault::LosesCaptures {
            *charge = answer.clone();
        }
        Ok(answer)
    }

    fn refund(&mut self, fault: Fault, request: &Value) -> Result<Value, &'static str> {
        let id = request["charge"].as_str().unwrap();
        let charge = self.present.get_mut(id).unwrap();
        let number = |name: &str| charge[name].as_i64().unwrap();
        let (refunded, captured) = (number("amount_refunded"), number("amount_captured"));
        let refundable = if captured == 0 {
            number("amount")
        } else {
            captured
        };
        let left = refundable - refunded;
        let amount = request["amount"].as_i64().unwrap_or(left.max(1));
        if fault == Fault::RefusesRefunds {
            return Err("amount_too_large");
        }
        if amount > left && fault != Fault::RefundsMoreThanIsLeft {
            return Err("amount_too_large");
        }
        let mut refund = json!({
            "id": format!("re_{}", self.refunds.len()), "object": "refund", "amount": amount,
            "charge": id, "metadata": request["metadata"], "status": "succeeded",
        });
        let answer = refund.clone();
        if fault == Fault::LosesRefunds {
            return Ok(answer);
        }
        let mut sum = refunded + amount;
        self.refunds.push(refund.clone());
        if fault == Fault::RefundsTwice {
            refund["id"] = json!(format!("re_{}", self.refunds.len()));
            self.refunds.push(refund);
            sum += amount;
        }
        charge["amount_refunded"] = json!(sum);
        charge["refunded"] = json!(sum == refundable);
        Ok(answer)
    }
}

async fn retrieve(State(guilty): State<Guilty>, Path(id): Path<String>) -> Json<Value> {
    let mut charge = guilty.books.lock().unwrap().present[&id].clone();
    let refunded = charge["amount_refunded"].as_i64().unwrap();
    if guilty.fault == Fault::MiscountsRefunds && refunded > 0 {
        charge["amount_refunded"] = json!(refunded - 1);
    }
    Json(charge)
}

#[derive(Deserialize)]
struct Page {
    limit: usize,
    starting_after: Option<String>,
    charge: Option<String>,
}

fn page_of(newest: &[Value], page: &Page) -> Json<Value> {
    let start = page.starting_after.as_ref().map_or(0, |id| {
        let at = newest.iter().position(|object| object["id"] == **id);
        at.unwrap() + 1
    });
    let rest = &newest[start..];
    Json(
        json!({"object": "list", "has_more": rest.len() > page.limit, "data": rest[..rest.len().min(page.limit)]}),
    )
}

/// Where it is, and what tells that somebody wants to pay.
async fn serve(guilty: Guilty) -> (String, Arc<Notify>) {
    let came = Arc::new(Notify::new());
    let told = Arc::clone(&came);
    let pay = post(async move |state, headers: HeaderMap, body| {
        told.notify_one();
        charge(state, &headers, body)
    });
    let router = Router::new()
        .route("/v1/charges", get(list).merge(pay))
        .route("/v1/charges/{id}", get(retrieve))
        .route("/v1/charges/{id}/capture", post(change))
        .route("/v1/refunds", get(list_refunds).post(change))
        .with_state(guilty);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (target, came)
}

async fn list(State(guilty): State<Guilty>, Query(page): Query<Page>) -> Json<Value> {
    let books = guilty.books.lock().unwrap();
    let newest = books.charges.iter().rev().map(|(_, charge)| charge.clone());
    let mut newest: Vec<_> = newest.collect();
    if guilty.fault == Fault::ForgetsCharges {
        newest.retain(|charge| charge["created"].as_u64().unwrap() % 10 != 3);
    }
    page_of(&newest, &page)
}

async fn list_refunds(State(guilty): State<Guilty>, Query(page): Query<Page>) -> Json<Value> {
    let books = guilty.books.lock().unwrap();
    let charge = page.charge.as_deref().unwrap();
    let newest = books.refunds.iter().rev();
    let newest: Vec<_> = newest
        .filter(|refund| refund["charge"] == *charge)
        .cloned()
        .collect();
    page_of(&newest, &page)
}

async fn at(fault: Fault) -> (i32, Value, String) {
    let (code, report, said) = storm_at(fault, &[]).await;
    let expected = i32::from(fault != Fault::Nothing);
    assert_eq!(code, expected, "the guilty got away, or others: {report}");
    (code, report, said)
}

async fn storm_at(fault: Fault, more: &[&str]) -> (i32, Value, String) {
    let guilty = Guilty {
        fault,
        books: Arc::default(),
    };
    let (target, _) = serve(guilty).await;
    // Only those who wait in vain should not do it for long.
    let patience = match fault {
        Fault::NeverAnswers | Fault::NeverAnswersChanges => "1s",
        _ => "60s",
    };
    let arguments = [
        "--target",
        &target,
        "--customers",
        "100",
        "--seed",
        "7",
        "--changes",
        "0.6",
        "--patience",
        patience,
    ];
    storm("sk_test_any", &[&arguments, more].concat()).await
}

#[tokio::test]
async fn a_server_that_charges_for_every_request_is_found_guilty() {
    let (_, report, said) = at(Fault::ChargesForEveryRequest).await;
    // Everybody: the audit alone asks each key twice.
    assert_eq!(counts(&report)[0], 100);
    let named = report["guilty"]["double_charges"].as_array().unwrap();
    assert_eq!(named.len(), 100);
    assert!(named[0].as_str().unwrap().starts_with("cus_storm_"));
    assert!(said.contains("100 double charges"), "{said}");
}

#[tokio::test]
async fn a_server_that_loses_charges_is_found_guilty() {
    let (_, report, _) = at(Fault::ForgetsCharges).await;
    assert_eq!(counts(&report), [0, 10, 0, 0], "{report}");
}

#[tokio::test]
async fn a_server_that_answers_differently_is_found_guilty() {
    let (_, report, _) = at(Fault::AnswersDifferently).await;
    // All but a few, whose first answer nobody saw.
    let [0, 0, differing @ 85..=100, 0] = counts(&report) else {
        panic!("{report}")
    };
    assert_eq!(
        report["guilty"]["differing_answers"]
            .as_array()
            .unwrap()
            .len() as u64,
        differing
    );
}

#[tokio::test]
async fn a_server_that_never_answers_is_found_guilty() {
    let (_, report, _) = at(Fault::NeverAnswers).await;
    assert_eq!(counts(&report), [0, 0, 0, 100], "{report}");
    let statuses: Vec<_> = report["answers_by_status"]
        .as_object()
        .unwrap()
        .keys()
        .filter(|status| *status != "none")
        .collect();
    assert_eq!(statuses, ["503"], "{report}");
}

/// What the faults of the others are measured against.
#[tokio::test]
async fn a_server_without_a_fault_is_not_found_guilty() {
    let (_, report, said) = at(Fault::Nothing).await;
    assert_eq!(counts(&report), [0; 4], "{report}");
    assert_eq!(changes(&report), BTreeMap::new(), "{report}");
    assert!(!said.contains("found"), "{said}");
    for done in ["captures_made", "refunds_made", "changes_refused"] {
        assert!(report[done].as_u64().unwrap() > 10, "{report}");
    }
}

/// Runs the storm at a server with this fault, which has to be called by these
/// names and no others, each at least so often.
async fn changes_are_found(fault: Fault, expected: &[(&'static str, u64)]) -> Value {
    let (_, report, said) = at(fault).await;
    let found = changes(&report);
    let names: Vec<_> = found.keys().copied().collect();
    let mut wanted: Vec<_> = expected.iter().map(|(name, _)| *name).collect();
    wanted.sort_unstable();
    assert_eq!(names, wanted, "{fault:?}: {report}");
    for (name, least) in expected {
        let count = found[name];
        assert!(count >= *least, "{fault:?}: {name} {count}: {report}");
        let guilty = report["guilty"][name].as_array().unwrap();
        assert_eq!(guilty.len() as u64, count);
        for culprit in guilty {
            let culprit = culprit.as_str().unwrap();
            assert!(
                culprit.starts_with("storm-") || culprit.starts_with("ch_"),
                "{culprit}"
            );
        }
        let in_words = format!("{count} {}", name.replace('_', " "));
        assert!(said.contains(&in_words), "{said}");
    }
    report
}

#[tokio::test]
async fn a_server_that_refunds_for_every_request_is_found_guilty() {
    let report = changes_are_found(
        Fault::RefundsForEveryRequest,
        &[("double_refunds", 3), ("wrong_refusals", 3)],
    )
    .await;
    assert!(counts(&report)[2] >= 10, "{report}");
}

#[tokio::test]
async fn a_server_that_doubles_refunds_is_found_guilty() {
    let report = changes_are_found(
        Fault::RefundsTwice,
        &[("double_refunds", 40), ("refunds_beyond_captured", 20)],
    )
    .await;
    // Its answers are all in order.
    assert_eq!(counts(&report), [0; 4], "{report}");
}

#[tokio::test]
async fn a_server_that_refunds_more_than_is_left_is_found_guilty() {
    let report = changes_are_found(
        Fault::RefundsMoreThanIsLeft,
        &[("refunds_beyond_captured", 10)],
    )
    .await;
    assert_eq!(counts(&report), [0; 4], "{report}");
}

#[tokio::test]
async fn a_server_that_loses_refunds_is_found_guilty() {
    changes_are_found(Fault::LosesRefunds, &[("lost_refunds", 40)]).await;
}

#[tokio::test]
async fn a_server_that_miscounts_refunds_is_found_guilty() {
    changes_are_found(Fault::MiscountsRefunds, &[("refunds_not_adding_up", 20)]).await;
}

#[tokio::test]
async fn a_server_that_refuses_possible_refunds_is_found_guilty() {
    changes_are_found(Fault::RefusesRefunds, &[("wrong_refusals", 40)]).await;
}

#[tokio::test]
async fn a_server_that_captures_twice_is_found_guilty() {
    let report = changes_are_found(Fault::CapturesTwice, &[("double_captures", 4)]).await;
    assert_eq!(counts(&report), [0; 4], "{report}");
}

#[tokio::test]
async fn a_server_that_captures_more_than_the_amount_is_found_guilty() {
    changes_are_found(
        Fault::CapturesMoreThanTheAmount,
        &[("captures_beyond_amount", 4)],
    )
    .await;
}

#[tokio::test]
async fn a_server_that_loses_captures_is_found_guilty() {
    // It forgets them at once, so it lets the next one through, too.
    changes_are_found(
        Fault::LosesCaptures,
        &[("lost_captures", 10), ("double_captures", 4)],
    )
    .await;
}

#[tokio::test]
async fn a_server_that_tells_changes_differently_is_found_guilty() {
    let report = changes_are_found(Fault::TellsChangesDifferently, &[]).await;
    let [0, 0, differing @ 40..=999, 0] = counts(&report) else {
        panic!("{report}")
    };
    let guilty = report["guilty"]["differing_answers"].as_array().unwrap();
    assert_eq!(guilty.len() as u64, differing);
    assert!(guilty[0].as_str().unwrap().starts_with("storm-"));
}

#[tokio::test]
async fn a_server_that_never_answers_changes_is_found_guilty() {
    let report = changes_are_found(Fault::NeverAnswersChanges, &[]).await;
    let [0, 0, 0, 1..=999] = counts(&report) else {
        panic!("{report}")
    };
}

/// What an expired answer excuses, and what it does not.
#[tokio::test]
async fn answers_that_expire_are_no_fault_where_that_is_said() {
    let (_, report, _) = at(Fault::Forgets).await;
    let [0, 0, differing, unanswered] = counts(&report) else {
        panic!("{report}")
    };
    assert!(differing >= 40 && unanswered >= 10, "{report}");

    let (code, report, said) = storm_at(Fault::Forgets, &["--answers-expire"]).await;
    assert_eq!(counts(&report), [0; 4], "{report}");
    assert_eq!(changes(&report), BTreeMap::new(), "{report}");
    assert_eq!(code, 0, "{said}");

    let (code, report, _) = storm_at(Fault::RefundsForEveryRequest, &["--answers-expire"]).await;
    assert_eq!(code, 1, "{report}");
    assert!(changes(&report)["double_refunds"] >= 3, "{report}");
    assert!(counts(&report)[2] >= 10, "{report}");
}

#[tokio::test]
async fn a_mistake_is_named() {
    for (arguments, named) in [
        (&["--target", "127.0.0.1:1"][..], "--target"),
        (
            &["--target", "http://127.0.0.1:1"],
            "http://127.0.0.1:1 does not answer",
        ),
        (&["--cut", "2"], "from 0 to 1"),
        (&["--changes", "30%"], "from 0 to 1"),
        (&["--customers", "0"], "--customers"),
    ] {
        let output = Command::new(BINARY)
            .arg("storm")
            .args(arguments)
            .env("PAYONCE_API_KEY", "sk_test_any")
            .output()
            .await
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        // 1 would mean that something wrong was found.
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(named), "{arguments:?}: {said}");
    }
}

/// A storm that has no end of its own.
fn endless(target: &str, api_key: &str) -> Command {
    let mut command = Command::new(BINARY);
    command
        .args(["storm", "--json", "--customers", "10000000"])
        .env("PAYONCE_URL", target)
        .env("PAYONCE_API_KEY", api_key)
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_storm_that_is_cut_short_audits_those_who_came(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let service = Process::serve(&crate::support::url(&pool)).await;
    let target = format!("http://{}", service.address);
    for signal in [Signal::INT, Signal::TERM] {
        let (before, refunds_before) =
            (count(&pool, "charges").await, count(&pool, "refunds").await);
        let storm = endless(&target, &api_key).spawn().unwrap();
        eventually("the storm blows", || async {
            count(&pool, "charges").await > before + 20
                && count(&pool, "refunds").await > refunds_before + 5
        })
        .await;
        send_signal(storm.id(), signal).unwrap();
        let output = storm.wait_with_output().await.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["cut_short"], true);
        assert_eq!(counts(&report), [0; 4], "{report}");
        let came = report["customers"].as_i64().unwrap();
        assert!(came > 20, "{report}");
        // Each of them has its charge now: the audit asks every key.
        assert_eq!(report["charges_made"], came);
        assert_eq!(count(&pool, "charges").await, before + came);
        // And so with what they had begun to do with it.
        assert_eq!(changes(&report), BTreeMap::new(), "{report}");
        assert!(report["customers_with_changes"].as_i64().unwrap() < came);
        assert_eq!(
            report["refunds_made"].as_i64().unwrap(),
            count(&pool, "refunds").await - refunds_before,
            "{report}"
        );
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains(&format!("cut short after {came} customers")),
            "{said}"
        );
    }
}

/// Interrupts a storm, and its audit too; gives exit code, report and last sentence.
async fn cut_short_twice(mut storm: Child) -> (i32, Value, String) {
    send_signal(storm.id(), Signal::INT).unwrap();
    let mut lines = BufReader::new(storm.stderr.take().unwrap()).lines();
    while !lines
        .next_line()
        .await
        .unwrap()
        .unwrap()
        .contains("Ctrl-C again")
    {}
    send_signal(storm.id(), Signal::INT).unwrap();
    let said = lines.next_line().await.unwrap().unwrap();
    let output = storm.wait_with_output().await.unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["cut_short"], true);
    for unknown in [
        "double_charges",
        "lost_charges",
        "unanswered_keys",
        "charges_made",
        "customers_with_changes",
        "captures_made",
        "refunds_made",
        "changes_refused",
    ]
    .iter()
    .chain(&CHANGES)
    {
        assert_eq!(
            report.get(unknown),
            Some(&Value::Null),
            "{unknown}: {report}"
        );
    }
    (output.status.code().unwrap(), report, said)
}

#[tokio::test]
async fn a_storm_that_is_cut_short_twice_reports_what_it_knows() {
    let guilty = Guilty {
        fault: Fault::NeverAnswers,
        books: Arc::default(),
    };
    let (target, came) = serve(guilty).await;
    let storm = endless(&target, "sk_test_any").spawn().unwrap();
    came.notified().await;
    let (code, _, said) = cut_short_twice(storm).await;
    assert!(said.contains("the charges were not audited"), "{said}");
    assert_eq!(code, 2);
}

#[tokio::test]
async fn what_was_seen_before_a_storm_was_cut_short_twice_is_found_wrong() {
    let books = Arc::<Mutex<Books>>::default();
    let guilty = Guilty {
        fault: Fault::TellsChangesDifferently,
        books: Arc::clone(&books),
    };
    let (target, _) = serve(guilty).await;
    let storm = endless(&target, "sk_test_any").spawn().unwrap();
    // Not each of them has been seen: answers get lost.
    eventually("changes are told differently", || async {
        books.lock().unwrap().told_differently > 100
    })
    .await;
    // Else the audit could come to its end before it is interrupted.
    books.lock().unwrap().hushed = true;
    let (code, report, said) = cut_short_twice(storm).await;
    let differing = report["differing_answers"].as_u64().unwrap();
    assert!(differing > 0, "{report}");
    let named = report["guilty"]["differing_answers"].as_array().unwrap();
    assert!(
        named
            .iter()
            .all(|key| key.as_str().unwrap().starts_with("storm-"))
    );
    assert!(
        said.contains(&format!("the storm found {differing} differing answers")),
        "{said}"
    );
    assert_eq!(code, 1);
}
