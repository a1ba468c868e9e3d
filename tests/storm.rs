//! The storm finds nothing at payonce, and finds the guilty elsewhere: a small
//! server with one fault each has to be caught by the count of that fault.

use std::{
    process::Stdio,
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    extract::{Query, State},
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
    process::Command,
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
        "--database-url",
        &url,
        "--history",
        history.to_str().unwrap(),
    ];
    let (code, report, said) = storm(&api_key, &arguments).await;
    assert_eq!(counts(&report), [0; 4], "{report}");
    assert_eq!(code, 0, "{said}");
    assert_eq!(report["table_findings"], json!([]));
    assert_eq!(report["charges_made"], 300);
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

/// What is wrong with a server.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    ChargesForEveryRequest,
    ForgetsCharges,
    AnswersDifferently,
    NeverAnswers,
}

#[derive(Clone)]
struct Guilty {
    fault: Fault,
    /// Key, first body, charge; newest last.
    charges: Arc<Mutex<Vec<(String, Value)>>>,
}

async fn charge(
    State(guilty): State<Guilty>,
    headers: HeaderMap,
    Json(request): Json<Value>,
) -> Response {
    if guilty.fault == Fault::NeverAnswers {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let mut charges = guilty.charges.lock().unwrap();
    if guilty.fault != Fault::ChargesForEveryRequest
        && let Some((_, first)) = charges.iter().find(|(used, _)| *used == key)
    {
        let mut answer = first.clone();
        if guilty.fault == Fault::AnswersDifferently {
            answer["description"] = json!("told again");
        }
        return ([("idempotent-replayed", "true")], Json(answer)).into_response();
    }
    let answer = json!({
        "id": format!("ch_{}", charges.len()), "object": "charge", "created": charges.len(),
        "amount": request["amount"], "customer": request["customer"], "status": "succeeded",
    });
    charges.push((key, answer.clone()));
    Json(answer).into_response()
}

#[derive(Deserialize)]
struct Page {
    limit: usize,
    starting_after: Option<String>,
}

async fn list(State(guilty): State<Guilty>, Query(page): Query<Page>) -> Json<Value> {
    let charges = guilty.charges.lock().unwrap();
    let mut newest: Vec<_> = charges
        .iter()
        .rev()
        .map(|(_, charge)| charge.clone())
        .collect();
    if guilty.fault == Fault::ForgetsCharges {
        newest.retain(|charge| charge["created"].as_u64().unwrap() % 10 != 3);
    }
    let start = page.starting_after.map_or(0, |id| {
        newest
            .iter()
            .position(|charge| charge["id"] == *id)
            .unwrap()
            + 1
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
    let pay = post(async move |state, headers, body| {
        told.notify_one();
        charge(state, headers, body).await
    });
    let router = Router::new()
        .route("/v1/charges", get(list).merge(pay))
        .with_state(guilty);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (target, came)
}

async fn at(fault: Fault) -> (i32, Value, String) {
    let guilty = Guilty {
        fault,
        charges: Arc::default(),
    };
    let (target, _) = serve(guilty).await;
    let (code, report, said) = storm(
        "sk_test_any",
        &[
            "--target",
            &target,
            "--customers",
            "100",
            "--seed",
            "7",
            "--patience",
            "1s",
        ],
    )
    .await;
    assert_eq!(code, 1, "the guilty got away: {report}");
    (code, report, said)
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

#[tokio::test]
async fn a_mistake_is_named() {
    for (arguments, named) in [
        (&["--target", "127.0.0.1:1"][..], "--target"),
        (
            &["--target", "http://127.0.0.1:1"],
            "http://127.0.0.1:1 does not answer",
        ),
        (&["--cut", "2"], "from 0 to 1"),
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
        let before = count(&pool, "charges").await;
        let storm = endless(&target, &api_key).spawn().unwrap();
        eventually("the storm blows", || async {
            count(&pool, "charges").await > before + 20
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
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains(&format!("cut short after {came} customers")),
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_storm_that_is_cut_short_twice_reports_what_it_knows() {
    let guilty = Guilty {
        fault: Fault::NeverAnswers,
        charges: Arc::default(),
    };
    let (target, came) = serve(guilty).await;
    let mut storm = endless(&target, "sk_test_any").spawn().unwrap();
    came.notified().await;
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
    ] {
        assert!(report[unknown].is_null(), "{unknown}: {report}");
    }
    assert!(said.contains("the charges were not audited"), "{said}");
    assert_eq!(output.status.code(), Some(2));
}
