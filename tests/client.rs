//! The client asks until it knows, under one key, and never calls certain what
//! is not.

use std::{
    process::Output,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use payonce::{
    charges::ChargeRequest,
    client::{Client, Failure, Last, Operation, Settings, Status},
    idempotency::Key,
    ids::ChargeId,
    money::{Amount, Currency},
};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    process::Command,
};

use crate::support::{
    count, eventually, make_account,
    process::{BINARY, Process},
};

const API_KEY: &str = "sk_test_aaaaaaaaaaaaaaaaaaaaaaaa";

/// What a small server does with a request.
#[derive(Clone)]
pub enum Act {
    /// Says this, and closes.
    Say(String),
    /// Closes without a word.
    Cut,
    /// Never answers.
    Hang,
    /// Lets the service do it, and loses the answer.
    Lose,
    /// Lets the service do it, and passes the answer on.
    Pass,
}

/// A request as it came.
pub struct Seen {
    at: Instant,
    head: String,
    pub body: String,
}

impl Seen {
    pub fn header(&self, name: &str) -> &str {
        let line = self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        });
        line.unwrap_or_else(|| panic!("no {name} in {}", self.head))
    }
}

/// Does one act for each request; the last one for all that come after.
pub struct Server {
    pub url: String,
    pub seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    async fn that(acts: impl Into<Vec<Act>>) -> Self {
        Self::before("", acts).await
    }

    /// In front of the service at this address.
    pub async fn before(service: &str, acts: impl Into<Vec<Act>>) -> Self {
        let (service, acts) = (service.to_owned(), acts.into());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let log = Arc::clone(&seen);
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (service, acts, log) = (service.clone(), acts.clone(), Arc::clone(&log));
                tokio::spawn(async move {
                    let (head, body) = read(&mut stream).await;
                    let request = format!("{head}{body}");
                    let act = {
                        let mut log = log.lock().unwrap();
                        let at = Instant::now();
                        log.push(Seen { at, head, body });
                        acts[(log.len() - 1).min(acts.len() - 1)].clone()
                    };
                    match act {
                        Act::Say(answer) => stream.write_all(answer.as_bytes()).await.unwrap(),
                        Act::Cut => {}
                        Act::Hang => std::future::pending().await,
                        Act::Lose | Act::Pass => {
                            let mut service = TcpStream::connect(service).await.unwrap();
                            service.write_all(request.as_bytes()).await.unwrap();
                            let (head, body) = read(&mut service).await;
                            if matches!(act, Act::Pass) {
                                // Or the client would keep a connection that ends here.
                                let head = head.replacen("\r\n", "\r\nconnection: close\r\n", 1);
                                let answer = format!("{head}{body}");
                                stream.write_all(answer.as_bytes()).await.unwrap();
                            }
                        }
                    }
                });
            }
        });
        Self { url, seen }
    }

    fn client(&self) -> Client {
        client(&self.url)
    }

    fn requests(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

/// One message: its head with the empty line, and its body.
async fn read(stream: &mut TcpStream) -> (String, String) {
    let mut message = Vec::new();
    loop {
        let text = String::from_utf8(message.clone()).unwrap();
        if let Some(end) = text.find("\r\n\r\n") {
            let (head, body) = text.split_at(end + 4);
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("content-length")
                    .then(|| value.parse::<usize>().unwrap())
            });
            if body.len() == length.unwrap() {
                return (head.to_owned(), body.to_owned());
            }
        }
        assert_ne!(stream.read_buf(&mut message).await.unwrap(), 0);
    }
}

fn say(status: u16, headers: &str, body: &str) -> Act {
    let length = body.len();
    Act::Say(format!(
        "HTTP/1.1 {status} Said\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    ))
}

fn charge() -> Value {
    json!({
        "id": ChargeId::new(), "object": "charge", "amount": 5000, "currency": "usd",
        "status": "succeeded", "paid": true, "captured": true, "created": 1_790_000_000,
        "customer": null, "description": null, "source": null, "metadata": {}, "new_field": 1,
    })
}

fn charged() -> Act {
    say(200, "", &charge().to_string())
}

/// An error as the service words it.
fn problem(status: u16, code: &str, headers: &str) -> Act {
    let same_key = status == 409 || status >= 500;
    let charge = (status == 402).then(ChargeId::new);
    let body = json!({
        "status": status, "retry": {"same_key": same_key, "new_key": false},
        "error": {"code": code, "message": "No.", "decline_code": null, "charge": charge},
    });
    let headers = format!("stripe-should-retry: {same_key}\r\n{headers}");
    say(status, &headers, &body.to_string())
}

fn unauthorized() -> Act {
    problem(401, "api_key_invalid", "")
}

fn client(url: &str) -> Client {
    limited(url, Duration::from_secs(20))
}

fn limited(url: &str, deadline: Duration) -> Client {
    Client::new(url, API_KEY).unwrap().with_settings(Settings {
        attempt_timeout: Duration::from_secs(10),
        deadline,
    })
}

fn operation() -> Operation {
    let (amount, currency) = (Amount::new(5000), Currency::from_code("usd"));
    Operation::charge(&ChargeRequest::new(amount.unwrap(), currency.unwrap()))
}

/// A port that is taken, so that no other test gets it, and where nobody listens.
struct Nowhere {
    url: String,
    _socket: TcpSocket,
}

fn nowhere() -> Nowhere {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    Nowhere {
        url: format!("http://{}", socket.local_addr().unwrap()),
        _socket: socket,
    }
}

#[track_caller]
fn assert_unknown(failure: &Failure, operation: &Operation) -> Last {
    assert!(!failure.certainly_not_charged(), "{failure}");
    let Failure::Unknown { key, last } = failure else {
        panic!("{failure:?}")
    };
    assert_eq!(key, operation.key());
    assert!(failure.to_string().contains(key.as_str()));
    last.clone()
}

#[tokio::test]
async fn every_attempt_carries_the_same_key_and_the_same_bytes() {
    let server = Server::that([
        Act::Cut,
        say(503, "", ""),
        problem(409, "idempotency_key_in_use", ""),
        charged(),
    ])
    .await;
    let operation = operation();
    let charged = server.client().send(&operation).await.unwrap();
    assert_eq!(charged.charge.amount.minor_units(), 5000);
    assert_eq!(charged.charge.status, Status::Succeeded);
    assert!(!charged.replayed);
    server.client().send(&operation).await.unwrap();
    let seen = server.seen.lock().unwrap();
    assert_eq!(seen.len(), 5);
    for request in seen.iter() {
        assert_eq!(request.header("idempotency-key"), operation.key().as_str());
        assert_eq!(request.header("authorization"), format!("Bearer {API_KEY}"));
        assert_eq!(request.body, seen[0].body);
    }
}

#[tokio::test]
async fn what_was_written_down_is_sent_under_the_same_key() {
    let server = Server::that([charged()]).await;
    let first = operation();
    server.client().send(&first).await.unwrap();
    let written = serde_json::to_string(&first).unwrap();
    let read: Operation = serde_json::from_str(&written).unwrap();
    server.client().send(&read).await.unwrap();
    let seen = server.seen.lock().unwrap();
    assert_eq!(
        seen[0].header("idempotency-key"),
        seen[1].header("idempotency-key")
    );
    assert_eq!(seen[0].body, seen[1].body);
}

#[tokio::test]
async fn the_service_says_whether_to_retry() {
    // Against its status each time; a redirect is not followed.
    for act in [
        say(503, "stripe-should-retry: false\r\n", ""),
        say(409, "stripe-should-retry: false\r\n", ""),
        say(404, "", "<h1>Not here</h1>"),
        say(307, "location: /elsewhere\r\n", ""),
    ] {
        let server = Server::that([act, charged()]).await;
        let operation = operation();
        let failure = server.client().send(&operation).await.unwrap_err();
        assert_eq!(server.requests(), 1);
        assert!(matches!(
            assert_unknown(&failure, &operation),
            Last::NotUnderstood { .. }
        ));
    }
    for act in [
        say(400, "stripe-should-retry: true\r\n", ""),
        say(429, "", ""),
        say(500, "", ""),
        say(409, "", ""),
    ] {
        let server = Server::that([act, charged()]).await;
        server.client().send(&operation()).await.unwrap();
        assert_eq!(server.requests(), 2);
    }
}

#[tokio::test]
async fn retry_after_is_waited_for() {
    let server = Server::that([problem(503, "unavailable", "retry-after: 2\r\n"), charged()]).await;
    server.client().send(&operation()).await.unwrap();
    let seen = server.seen.lock().unwrap();
    assert!(seen[1].at - seen[0].at >= Duration::from_secs(2));
}

#[tokio::test]
async fn what_would_end_after_the_deadline_is_not_begun() {
    let server = Server::that([problem(
        409,
        "idempotency_key_in_use",
        "retry-after: 60\r\n",
    )])
    .await;
    let operation = operation();
    let started = Instant::now();
    let failure = server.client().send(&operation).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(15));
    assert_eq!(server.requests(), 1);
    let Last::Unavailable(refusal) = assert_unknown(&failure, &operation) else {
        panic!("{failure:?}")
    };
    assert_eq!(
        (refusal.status, refusal.code.as_str()),
        (409, "idempotency_key_in_use")
    );
}

#[tokio::test]
async fn the_deadline_ends_it() {
    for act in [say(503, "", ""), Act::Cut, Act::Hang] {
        let server = Server::that([act]).await;
        let operation = operation();
        let started = Instant::now();
        let failure = limited(&server.url, Duration::from_secs(1))
            .send(&operation)
            .await
            .unwrap_err();
        // An attempt alone could take ten seconds.
        assert!(started.elapsed() < Duration::from_secs(8));
        assert_unknown(&failure, &operation);
    }
}

#[tokio::test]
async fn a_time_out_is_unknown_and_is_asked_again() {
    let server = Server::that([Act::Hang, Act::Hang, charged()]).await;
    let client = server.client().with_settings(Settings {
        attempt_timeout: Duration::from_millis(300),
        deadline: Duration::from_secs(20),
    });
    client.send(&operation()).await.unwrap();
    assert!(server.requests() >= 3);

    let server = Server::that([Act::Hang]).await;
    let operation = operation();
    let failure = limited(&server.url, Duration::from_millis(500))
        .send(&operation)
        .await
        .unwrap_err();
    assert_eq!(assert_unknown(&failure, &operation), Last::TimedOut);
}

#[tokio::test]
async fn nobody_there_is_certain() {
    let operation = operation();
    let nowhere = nowhere();
    let client = limited(&nowhere.url, Duration::from_secs(1));
    // A second time too: nothing was sent the first time.
    for _ in 0..2 {
        let failure = client.send(&operation).await.unwrap_err();
        assert!(matches!(failure, Failure::NotSent(_)), "{failure:?}");
        assert!(failure.certainly_not_charged());
    }
}

#[tokio::test]
async fn nobody_there_is_not_certain_once_an_answer_was_lost() {
    let server = Server::that([Act::Cut]).await;
    let operation = operation();
    let quick = Duration::from_millis(500);
    let failure = limited(&server.url, quick)
        .send(&operation)
        .await
        .unwrap_err();
    assert_unknown(&failure, &operation);
    // The doubt belongs to the operation, its clones too, and survives the send.
    let failure = limited(&nowhere().url, quick)
        .send(&operation.clone())
        .await
        .unwrap_err();
    assert!(matches!(
        assert_unknown(&failure, &operation),
        Last::NotReached(_)
    ));
}

#[tokio::test]
async fn nobody_there_is_not_certain_once_an_attempt_was_dropped() {
    let server = Server::that([Act::Hang]).await;
    let (operation, client) = (operation(), server.client());
    tokio::select! {
        _ = client.send(&operation) => panic!("nobody answers"),
        () = eventually("the request is there", || async { server.requests() == 1 }) => {}
    }
    let failure = limited(&nowhere().url, Duration::from_millis(500))
        .send(&operation)
        .await
        .unwrap_err();
    assert_unknown(&failure, &operation);
}

#[tokio::test]
async fn a_refusal_of_the_only_attempt_is_certain() {
    let server = Server::that([unauthorized()]).await;
    let operation = operation();
    for _ in 0..2 {
        let failure = server.client().send(&operation).await.unwrap_err();
        let Failure::Refused(refusal) = &failure else {
            panic!("{failure:?}")
        };
        assert_eq!(
            (refusal.status, refusal.code.as_str()),
            (401, "api_key_invalid")
        );
        assert!(failure.certainly_not_charged());
    }
    assert_eq!(server.requests(), 2);
}

#[tokio::test]
async fn a_refusal_is_not_certain_where_something_may_have_gone_before() {
    // A lost answer, an error of the service's, a time-out.
    for first in [
        Act::Cut,
        problem(503, "unavailable", ""),
        say(502, "", "<h1>Bad gateway</h1>"),
    ] {
        let server = Server::that([first, unauthorized()]).await;
        let operation = operation();
        let failure = server.client().send(&operation).await.unwrap_err();
        assert_eq!(server.requests(), 2);
        assert!(matches!(
            assert_unknown(&failure, &operation),
            Last::Refused(_)
        ));
    }

    // A charge that is known.
    let server = Server::that([charged(), unauthorized()]).await;
    let asked = operation();
    server.client().send(&asked).await.unwrap();
    assert_unknown(&server.client().send(&asked).await.unwrap_err(), &asked);

    // Somebody else, under the same key.
    let server = Server::that([unauthorized()]).await;
    let written = serde_json::to_string(&operation()).unwrap();
    for operation in [
        serde_json::from_str(&written).unwrap(),
        operation().with_key(Key::from_header(b"order_1").unwrap()),
    ] {
        let failure = server.client().send(&operation).await.unwrap_err();
        assert_unknown(&failure, &operation);
    }
}

/// The key belongs to a request that differs in this.
fn reused(differs: &Value) -> Act {
    let body = json!({
        "status": 422, "retry": {"same_key": false, "new_key": true}, "differs": differs,
        "error": {"code": "idempotency_key_reused", "message": "No."},
    });
    say(422, "stripe-should-retry: false\r\n", &body.to_string())
}

#[tokio::test]
async fn a_decline_and_the_key_of_another_charge_are_certain_whatever_went_before() {
    for (act, declined) in [
        (problem(402, "card_declined", ""), true),
        (reused(&json!(["amount"])), false),
    ] {
        let server = Server::that([Act::Cut, act]).await;
        let failure = server.client().send(&operation()).await.unwrap_err();
        assert!(failure.certainly_not_charged());
        assert_eq!(matches!(failure, Failure::Declined(_)), declined);
        assert_eq!(matches!(failure, Failure::KeyReused(_)), !declined);
        assert_eq!(server.requests(), 2);
    }
}

/// A key is remembered across kinds of request only as long as its answer is kept.
#[tokio::test]
async fn the_key_of_a_request_of_another_kind_proves_nothing() {
    for differs in [json!(["path"]), json!(null)] {
        let server = Server::that([reused(&differs)]).await;
        let failure = server.client().send(&operation()).await.unwrap_err();
        assert!(!failure.certainly_not_charged(), "{failure}");
        assert!(matches!(failure, Failure::KeyReused(_)), "{failure:?}");
        assert!(failure.to_string().contains("idempotency_keys"));
        assert_eq!(server.requests(), 1);

        let server = Server::that([reused(&differs)]).await;
        let keyed = ["--amount", "1", "--deadline", "1s", "--key", "order_1"];
        let output = payonce(API_KEY, &server.url, &keyed).await;
        assert_eq!(output.status.code(), Some(3), "{}", said(&output));
        assert!(!said(&output).contains("certainly"), "{}", said(&output));
    }
}

/// Why it proves nothing: both can come true.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_a_reused_key_says_is_true_of_the_service(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let url = pool.connect_options().to_url_lossy().to_string();
    let service = Process::serve(&url).await;
    let base = format!("http://{}", service.address);
    let client = Client::new(&base, &api_key).unwrap();
    let expire = async || {
        sqlx::query("update idempotency_keys set expires_at = now() - interval '1 second'")
            .execute(&pool)
            .await
            .unwrap();
    };
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let update = async |charge: ChargeId, key: &Key| {
        let url = format!("{base}/v1/charges/{charge}");
        let call = http
            .post(url)
            .bearer_auth(&api_key)
            .header("idempotency-key", key.as_str());
        let answer = call.body("").send().await.unwrap();
        assert_eq!(answer.status(), 200);
    };
    let amount = |minor_units| {
        let (amount, currency) = (Amount::new(minor_units), Currency::from_code("usd"));
        Operation::charge(&ChargeRequest::new(amount.unwrap(), currency.unwrap()))
    };
    let one = client.send(&operation()).await.unwrap().charge.id;

    // An update has the key; a charge under it is refused, and made a day later.
    let late = operation();
    update(one, late.key()).await;
    let failure = client.send(&late).await.unwrap_err();
    assert!(!failure.certainly_not_charged(), "{failure}");
    expire().await;
    let charged = client.send(&late).await.unwrap();
    assert!(!charged.replayed);

    // Now a charge has it, for good.
    let other = amount(4999).with_key(late.key().clone());
    let failure = client.send(&other).await.unwrap_err();
    assert!(failure.certainly_not_charged(), "{failure}");

    // It was charged, and an update has got the key since.
    let early = operation();
    client.send(&early).await.unwrap();
    expire().await;
    update(one, early.key()).await;
    let failure = client.send(&early).await.unwrap_err();
    assert!(!failure.certainly_not_charged(), "{failure}");

    // Once that is forgotten, the charge is found.
    let key = early.key().clone();
    for _ in 0..2 {
        expire().await;
        let refused = amount(4998).with_key(key.clone());
        let failure = client.send(&refused).await.unwrap_err();
        assert!(matches!(failure, Failure::KeyReused(_)), "{failure:?}");
    }
    assert_eq!(count(&pool, "charges").await, 3);
    service.terminate().await;
}

#[tokio::test]
async fn an_answer_that_cannot_be_read_is_no_answer() {
    let whole = charge().to_string();
    let cut = |status: u16, headers: &str| {
        Act::Say(format!(
            "HTTP/1.1 {status} Said\r\ncontent-length: 4096\r\n{headers}\r\n{}",
            &whole[..20]
        ))
    };
    for broken in [
        cut(200, ""),
        // Its header says not to retry, and yet the outcome is not here.
        cut(402, "stripe-should-retry: false\r\n"),
        cut(401, "stripe-should-retry: false\r\n"),
        say(200, "", &whole[..20]),
        say(200, "", "<h1>Welcome to our network</h1>"),
        say(204, "", ""),
        Act::Say("not HTTP at all\r\n\r\n".to_owned()),
    ] {
        let server = Server::that([broken.clone(), charged()]).await;
        server.client().send(&operation()).await.unwrap();
        assert_eq!(server.requests(), 2);

        let server = Server::that([broken, unauthorized()]).await;
        let operation = operation();
        let failure = server.client().send(&operation).await.unwrap_err();
        assert_unknown(&failure, &operation);
    }

    // A gateway's 4xx proves nothing of the service, whatever it looks like.
    let other = r#"{"error":{"code":"forbidden","message":"No."}}"#;
    for status in [401, 402, 403, 422] {
        let server = Server::that([say(status, "", other)]).await;
        let operation = operation();
        let failure = server.client().send(&operation).await.unwrap_err();
        assert_eq!(
            assert_unknown(&failure, &operation),
            Last::NotUnderstood { status }
        );
    }
}

#[tokio::test]
async fn nothing_secret_is_shown() {
    let request = ChargeRequest {
        customer: Some("cus_secret".to_owned()),
        ..ChargeRequest::new(Amount::new(1).unwrap(), Currency::from_code("usd").unwrap())
    };
    let operation = Operation::charge(&request);
    let server = Server::that([Act::Cut]).await;
    let client = limited(&server.url, Duration::from_millis(300));
    let failure = client.send(&operation).await.unwrap_err();
    for shown in [
        format!("{operation:?} {client:?} {failure:?}"),
        format!(
            "{:?}",
            Client::new("http://user:hidden@h", "sk_test_\n").unwrap_err()
        ),
    ] {
        for secret in [
            API_KEY,
            operation.key().as_str(),
            "cus_secret",
            "hidden",
            "sk_test_",
        ] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
    let said = failure.to_string();
    assert!(
        !said.contains(API_KEY) && !said.contains("cus_secret"),
        "{said}"
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn lost_answers_end_in_one_charge(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let url = pool.connect_options().to_url_lossy().to_string();
    let service = Process::serve(&url).await;
    let acts = [Act::Lose, Act::Lose, Act::Cut, Act::Lose, Act::Pass];
    let proxy = Server::before(&service.address, acts).await;
    let client = Client::new(&proxy.url, &api_key).unwrap();
    let operation = operation();
    let charged = client.send(&operation).await.unwrap();
    assert_eq!(proxy.requests(), 5);
    assert!(charged.replayed);
    assert!(charged.request_id.is_some());
    assert_eq!(count(&pool, "charges").await, 1);

    // Straight away, without the proxy: the same charge, the same bytes.
    let direct = Client::new(&format!("http://{}/", service.address), &api_key).unwrap();
    let again = direct.send(&operation).await.unwrap();
    assert_eq!(again.body, charged.body);

    // A decline whose answer is lost is a decline.
    let proxy = Server::before(&service.address, [Act::Lose, Act::Pass]).await;
    let request = ChargeRequest {
        source: Some("tok_chargeDeclinedInsufficientFunds".to_owned()),
        ..ChargeRequest::new(Amount::new(1).unwrap(), Currency::from_code("usd").unwrap())
    };
    let client = Client::new(&proxy.url, &api_key).unwrap();
    let failure = client.send(&Operation::charge(&request)).await.unwrap_err();
    let Failure::Declined(decline) = failure else {
        panic!("{failure:?}")
    };
    assert_eq!(decline.decline_code.as_deref(), Some("insufficient_funds"));
    assert!(decline.replayed);
    assert_eq!(count(&pool, "charges").await, 2);
}

/// `payonce charge`: how it ends.
async fn payonce(api_key: &str, target: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command
        .args(["charge", "--currency", "usd", "--target", target])
        .args(arguments)
        .env("PAYONCE_API_KEY", api_key)
        .env_remove("RUST_LOG")
        .current_dir(std::env::temp_dir());
    command.output().await.unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The key that was made for it.
fn made_key(output: &Output) -> String {
    let said = said(output);
    let key = said.lines().find_map(|line| line.strip_prefix("key "));
    key.unwrap_or_else(|| panic!("no key in {said}")).to_owned()
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_command_charges_once(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let url = pool.connect_options().to_url_lossy().to_string();
    let service = Process::serve(&url).await;
    let target = format!("http://{}", service.address);

    let arguments = [
        "--amount",
        "5000",
        "--metadata",
        "order=7",
        "--metadata",
        "note=a=b",
        "--key",
        "order_7",
    ];
    let first = payonce(&api_key, &target, &arguments).await;
    assert_eq!(first.status.code(), Some(0), "{}", said(&first));
    let charge: Value = serde_json::from_slice(&first.stdout).unwrap();
    assert_eq!(charge["amount"], 5000);
    assert_eq!(charge["metadata"], json!({"order": "7", "note": "a=b"}));
    let again = payonce(&api_key, &target, &arguments).await;
    assert_eq!(again.status.code(), Some(0));
    assert_eq!(again.stdout, first.stdout);
    assert_eq!(count(&pool, "charges").await, 1);

    // Under the key that was made for it.
    let fresh = payonce(&api_key, &target, &["--amount", "1"]).await;
    assert_eq!(fresh.status.code(), Some(0));
    let key = made_key(&fresh);
    let again = payonce(&api_key, &target, &["--amount", "1", "--key", &key]).await;
    assert_eq!(again.stdout, fresh.stdout);
    assert_eq!(count(&pool, "charges").await, 2);

    for (arguments, named) in [
        (
            &["--amount", "1", "--source", "tok_chargeDeclined"][..],
            "card_declined",
        ),
        (&["--amount", "1", "--source", "tok_none"], "source"),
        (
            &["--amount", "6000", "--key", "order_7"],
            "may have charged",
        ),
        (
            &["--amount", "1", "--metadata", "a=1", "--metadata", "a=2"],
            "twice",
        ),
    ] {
        let output = payonce(&api_key, &target, arguments).await;
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(output.stdout.is_empty());
        assert!(
            said.contains("certainly not charged") && said.contains(named),
            "{said}"
        );
    }
    let stranger = payonce(API_KEY, &target, &["--amount", "1"]).await;
    assert_eq!(stranger.status.code(), Some(1), "{}", said(&stranger));
    assert!(!said(&stranger).contains(API_KEY));
}

#[tokio::test]
async fn the_command_says_what_is_certain() {
    let quick = ["--amount", "5000", "--deadline", "1s"];
    let output = payonce(API_KEY, &nowhere().url, &quick).await;
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("certainly not charged"));

    // A key that may have been used before: an outage proves nothing.
    let keyed = ["--amount", "5000", "--deadline", "1s", "--key", "order_1"];
    let output = payonce(API_KEY, &nowhere().url, &keyed).await;
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("order_1"));

    let server = Server::that([Act::Hang]).await;
    let patient = ["--amount", "5000", "--deadline", "3s"];
    let output = payonce(API_KEY, &server.url, &patient).await;
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    let key = made_key(&output);
    assert!(said(&output).contains(&format!("same key: {key}")));
    assert_eq!(
        server.seen.lock().unwrap()[0].header("idempotency-key"),
        key
    );

    let mut pending = charge();
    pending["status"] = json!("pending");
    pending["paid"] = json!(false);
    let server = Server::that([say(202, "", &pending.to_string())]).await;
    let output = payonce(API_KEY, &server.url, &quick).await;
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("pending") && !output.stdout.is_empty());

    for wrong in [
        &["--amount", "0"][..],
        &["--amount", "1", "--key", ""],
        &["--amount", "1", "--metadata", "a"],
        &["--amount", "1", "--target", "http://user:hidden@h"],
    ] {
        let output = payonce(API_KEY, &server.url, wrong).await;
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    }
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn a_charge_that_cannot_be_shown_is_not_called_certain() {
    let server = Server::that([charged()]).await;
    // Writing to it fails.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(BINARY)
        .args([
            "charge",
            "--amount",
            "5000",
            "--currency",
            "usd",
            "--target",
            &server.url,
        ])
        .env("PAYONCE_API_KEY", API_KEY)
        .current_dir(std::env::temp_dir())
        .stdout(writer)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert_eq!(server.requests(), 1);
}
