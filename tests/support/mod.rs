//! What the tests share: a service on a database of its own, and requests to it.

pub mod pgbouncer;
pub mod postgres;
pub mod process;
pub mod proxy;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Request, StatusCode, request},
};
use http_body_util::BodyExt;
use payonce::{
    accounts,
    charges::{Charge, ChargeRequest, CreateCharge},
    db::Server,
    http::{
        App, DuplicateGuard, Keyless,
        admission::Admission,
        caller::{self, Callers, Peer},
        limit::Limits,
        router,
    },
    idempotency::{FieldDigests, Fingerprint, Key, Rules, Scenario, Scope, held::HeldKeys},
    ids::{AccountId, RequestId},
    money::{Amount, Currency},
    processor::Outcome,
    reader::Reader,
    writer::{self, Writer},
};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool, postgres::PgConnectOptions};
use tower::ServiceExt;

/// The service as a replica would run it, reached without a network.
#[derive(Clone)]
pub struct Service {
    pub app: App,
    router: Router,
    pub account_id: AccountId,
    api_key: String,
    settings: Settings,
    /// The test's own way to the database.
    pub pool: PgPool,
}

/// What a test may want to have otherwise.
#[derive(Clone)]
pub struct Settings {
    pub batch_max: usize,
    pub queue_max: u32,
    pub pool_size: u32,
    pub answer_ttl: Duration,
    pub wait: Duration,
    pub keyless: Keyless,
    pub rate_limit: u32,
    pub duplicate_guard: DuplicateGuard,
    pub callers: caller::Options,
}

impl Default for Settings {
    /// A small pool, so that whoever hoards connections is found out.
    fn default() -> Self {
        Self {
            batch_max: 256,
            queue_max: 8192,
            pool_size: 2,
            answer_ttl: Duration::from_hours(24),
            // The longest: on a slow machine what is in flight takes its time.
            wait: Duration::from_secs(10),
            keyless: Keyless::Refuse,
            rate_limit: 0,
            duplicate_guard: DuplicateGuard::Off,
            callers: caller::Options::default(),
        }
    }
}

impl Service {
    pub async fn start(pool: &PgPool) -> Self {
        Self::start_with(pool, Settings::default()).await
    }

    pub async fn start_with(pool: &PgPool, settings: Settings) -> Self {
        let (account_id, api_key) = make_account(pool).await;
        let app = app(&pool.connect_options(), &settings);
        Self {
            router: router(app.clone()),
            app,
            account_id,
            api_key,
            settings,
            pool: pool.clone(),
        }
    }

    /// One more replica on the same database: a writer and a pool of its own.
    pub fn replica(&self) -> Self {
        self.replica_with(self.settings.clone())
    }

    pub fn replica_with(&self, settings: Settings) -> Self {
        let app = app(&self.pool.connect_options(), &settings);
        Self {
            router: router(app.clone()),
            app,
            settings,
            ..self.clone()
        }
    }

    /// One more replica, that reaches the database through PgBouncer.
    pub fn behind_pooler(&self, pgbouncer: &pgbouncer::PgBouncer) -> Self {
        let options = pgbouncer.options(&self.pool.connect_options());
        let app = app_on(&Server::behind_pooler(options), &self.settings);
        Self {
            router: router(app.clone()),
            app,
            ..self.clone()
        }
    }

    /// The same account, at another replica.
    pub fn at(&self, replica: &Self) -> Self {
        Self {
            router: replica.router.clone(),
            app: replica.app.clone(),
            ..self.clone()
        }
    }

    /// One more replica, on another server that has the same data.
    pub fn on(&self, pool: &PgPool) -> Self {
        let app = app(&pool.connect_options(), &self.settings);
        Self {
            router: router(app.clone()),
            app,
            pool: pool.clone(),
            ..self.clone()
        }
    }

    /// One more replica, that reaches the database through a proxy.
    pub fn behind(&self, proxy: &proxy::Proxy) -> Self {
        let app = app(&proxy.options(&self.pool.connect_options()), &self.settings);
        Self {
            router: router(app.clone()),
            app,
            ..self.clone()
        }
    }

    /// The same replica, that has forgotten who its callers are.
    pub fn with_cold_callers(&self) -> Self {
        let app = App {
            callers: self.app.callers.cold(),
            ..self.app.clone()
        };
        Self {
            router: router(app.clone()),
            app,
            ..self.clone()
        }
    }

    /// The same replica, spoken to by another account.
    pub async fn other_account(&self) -> Self {
        let (account_id, api_key) = make_account(&self.pool).await;
        Self {
            account_id,
            api_key,
            ..self.clone()
        }
    }

    pub fn get(&self, path: &str) -> Call {
        self.call("GET", path)
    }

    pub fn post(&self, path: &str, key: &str) -> Call {
        self.call("POST", path).header("idempotency-key", key)
    }

    /// A charge that is in order, under this key.
    pub fn charge(&self, key: &str) -> Call {
        self.post("/v1/charges", key)
            .json(&json!({"amount": 5000, "currency": "usd", "customer": "cus_ABC123"}))
    }

    pub fn call(&self, method: &str, path: &str) -> Call {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("authorization", format!("Bearer {}", self.api_key));
        Call {
            router: self.router.clone(),
            request,
            body: Body::empty(),
        }
    }

    /// Without an API key.
    pub fn stranger(&self, method: &str, path: &str) -> Call {
        let request = Request::builder().method(method).uri(path);
        Call {
            router: self.router.clone(),
            request,
            body: Body::empty(),
        }
    }

    pub async fn count_charges(&self) -> i64 {
        count(&self.pool, "charges").await
    }
}

/// Where the database is, for a process.
pub fn url(pool: &PgPool) -> String {
    pool.connect_options().to_url_lossy().to_string()
}

/// The number of rows in a table.
pub async fn count(pool: &PgPool, table: &'static str) -> i64 {
    sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select count(*) from {table}")))
        .fetch_one(pool)
        .await
        .unwrap()
}

fn app(options: &PgConnectOptions, settings: &Settings) -> App {
    app_on(&Server::direct(options.clone()), settings)
}

fn app_on(server: &Server, settings: &Settings) -> App {
    let writer = Writer::start(writer::Options {
        server: server.clone(),
        batch_max: settings.batch_max,
        queue_max: settings.queue_max,
    });
    let pool = server.pool(settings.pool_size);
    let payment = format!("payment={}us", settings.answer_ttl.as_micros());
    App {
        callers: Callers::new(server.pool(caller::CONNECTIONS), settings.callers),
        admission: Admission::new(settings.pool_size),
        held_keys: HeldKeys::default(),
        pool,
        reader: Reader::start(server),
        writer,
        wait: settings.wait,
        rules: Rules::with(&[payment.parse().unwrap()]).unwrap(),
        limits: Limits::per_second(settings.rate_limit),
        keyless: settings.keyless,
        duplicate_guard: settings.duplicate_guard,
        duplicate_guard_window: Duration::from_mins(5),
    }
}

pub async fn make_account(pool: &PgPool) -> (AccountId, String) {
    let mut conn = pool.acquire().await.unwrap();
    let account_id = accounts::create(&mut conn, "a merchant").await.unwrap();
    let (_, api_key) = accounts::create_api_key(&mut conn, account_id)
        .await
        .unwrap()
        .unwrap();
    (account_id, api_key.reveal().to_owned())
}

/// A create-charge command as it enters the writer.
pub fn command(account_id: AccountId, key: &str) -> CreateCharge {
    let request = ChargeRequest {
        amount: Amount::new(5000).unwrap(),
        currency: Currency::from_code("usd").unwrap(),
        customer: None,
        source: None,
        description: None,
        metadata: BTreeMap::default(),
        capture: true,
    };
    let fingerprint = Fingerprint::new("POST", "/v1/charges", &request);
    let digests = FieldDigests::new("POST", "/v1/charges", &request);
    let charge = Charge::decided(request, Outcome::Approved, RequestId::new());
    CreateCharge {
        scope: Scope {
            account_id,
            key: Key::from_header(key.as_bytes()).unwrap(),
        },
        fingerprint,
        digests,
        rule: Scenario::Payment.default_rule(),
        keyed: true,
        guard: None,
        answer: charge.answer(),
        charge,
    }
}

/// A request that has not been sent yet.
pub struct Call {
    router: Router,
    request: request::Builder,
    body: Body,
}

impl Call {
    pub fn header(self, name: &str, value: &str) -> Self {
        Self {
            request: self.request.header(name, value),
            ..self
        }
    }

    /// As the accept loop says where it came from.
    pub fn at_address(self, address: &str) -> Self {
        Self {
            request: self.request.extension(Peer(address.parse().unwrap())),
            ..self
        }
    }

    pub fn json(self, body: &Value) -> Self {
        self.header("content-type", "application/json")
            .body(body.to_string())
    }

    pub fn form(self, body: &str) -> Self {
        self.header("content-type", "application/x-www-form-urlencoded")
            .body(body.to_owned())
    }

    pub fn body(self, body: impl Into<Body>) -> Self {
        Self {
            body: body.into(),
            ..self
        }
    }

    pub async fn send(self) -> Reply {
        let request = self.request.body(self.body).unwrap();
        let response = self.router.oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Reply {
            status: parts.status,
            headers: parts.headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        }
    }
}

/// What comes back when it is asked again under the same key for as long as it
/// is put off, as clients do, and how often it was asked. How slow the machine
/// is does not matter; a service that puts off before a request's ten seconds
/// are used up does.
pub async fn persistently(call: impl Fn() -> Call) -> (Reply, u32) {
    for attempt in 1..=12 {
        let started = Instant::now();
        let reply = call().send().await;
        let put_off = match reply.status.as_u16() {
            503 => true,
            409 => reply.error_code() == "idempotency_key_in_use",
            _ => false,
        };
        if !put_off {
            return (reply, attempt);
        }
        let took = started.elapsed();
        assert!(
            took >= Duration::from_secs(9),
            "put off after {took:?}: {reply:?}"
        );
    }
    panic!("it was put off for two minutes");
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl Reply {
    pub fn value(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// The id of the charge that was made.
    pub fn charge_id(&self) -> String {
        assert_eq!(self.status, 200, "{self:?}");
        self.value()["id"].as_str().unwrap().to_owned()
    }

    pub fn is_replayed(&self) -> bool {
        self.headers
            .get("idempotent-replayed")
            .is_some_and(|value| value == "true")
    }

    pub fn error_code(&self) -> String {
        self.value()["error"]["code"]
            .as_str()
            .unwrap_or_else(|| panic!("{self:?}"))
            .to_owned()
    }

    /// Asserts an error by status and code.
    #[track_caller]
    pub fn assert_error(&self, status: u16, code: &str) -> &Self {
        assert_eq!(
            (self.status.as_u16(), self.error_code().as_str()),
            (status, code),
            "{self:?}"
        );
        self
    }
}

/// Waits for a condition that has to come true; the limit is there so that a
/// broken promise fails the test instead of hanging it.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let waited = tokio::time::timeout(Duration::from_mins(2), async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "it did not come to pass that {what}");
}

/// Waits until somebody in this database waits for a lock: a request that runs
/// into a lock of the test's is then in the middle of its statement.
pub async fn somebody_is_blocked(pool: &PgPool) {
    are_blocked(pool, 1).await;
}

/// The same for so many at once.
pub async fn are_blocked(pool: &PgPool, sessions: i64) {
    let blocked = || async {
        let count: i64 = sqlx::query_scalar(
            "select count(*) from pg_locks join pg_database on pg_database.oid = database
             where datname = current_database() and not granted",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        count >= sessions
    };
    eventually("requests run into the lock", blocked).await;
}
