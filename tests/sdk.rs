//! What a client sees that nobody here wrote: Stripe's SDK for Python. The cases
//! are in tests/sdk/; here is what they run against.

use std::process::Stdio;

use sqlx::{ConnectOptions, PgPool};
use tokio::process::Command;

use crate::{
    client::{Act, Server},
    support::{
        count, make_account,
        process::Process,
        proxy::{Network, Proxy},
        url,
    },
};

/// The cases, and what they are told.
struct Suite {
    python: String,
    settings: Vec<(&'static str, String)>,
}

impl Suite {
    /// For this service; `None` where there is no SDK.
    async fn of(pool: &PgPool, service: &Process) -> Option<Self> {
        let python = std::env::var("STRIPE_SDK_PYTHON").unwrap_or_default();
        if python.is_empty() {
            eprintln!("STRIPE_SDK_PYTHON names no python that has Stripe's SDK; make test does");
            return None;
        }
        let (_, api_key) = make_account(pool).await;
        let settings = vec![
            ("PAYONCE_API_KEY", api_key),
            ("PAYONCE_URL", format!("http://{}", service.address)),
        ];
        Some(Self { python, settings })
    }

    fn with(mut self, name: &'static str, value: String) -> Self {
        self.settings.push((name, value));
        self
    }

    /// Runs a module of tests/sdk/, or a class in one.
    async fn run(&self, cases: &str) {
        let output = Command::new(&self.python)
            .args(["-B", "-m", "unittest", "-v", cases])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdk"))
            .envs(self.settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        eprintln!("{said}{}", String::from_utf8_lossy(&output.stdout));
        assert!(output.status.success(), "{cases} failed");
        assert!(!said.contains("Ran 0 tests"), "{cases} has no cases");
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_sdk_is_understood_and_understands(pool: PgPool) {
    let service = Process::serve(&url(&pool)).await;
    let Some(suite) = Suite::of(&pool, &service).await else {
        return;
    };
    suite.run("api").await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_sdk_asks_again_and_charges_once(pool: PgPool) {
    let service = Process::serve(&url(&pool)).await;
    let Some(suite) = Suite::of(&pool, &service).await else {
        return;
    };
    let lossy = Server::before(&service.address, [Act::Lose, Act::Lose, Act::Pass]).await;
    let suite = suite.with("LOSSY_URL", lossy.url.clone());
    suite.run("lost_answers").await;

    assert_eq!(count(&pool, "charges").await, 1);
    let seen = lossy.seen.lock().unwrap();
    let keys: Vec<_> = seen.iter().map(|r| r.header("idempotency-key")).collect();
    assert_eq!(keys.len(), 3, "no answer was lost, so nothing was tested");
    assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
    assert!(seen.iter().all(|request| request.body == seen[0].body));
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn the_sdk_is_told_of_an_outage_and_asks_again_after_it(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let behind = proxy.options(&pool.connect_options()).to_url_lossy();
    let service = Process::serve(behind.as_str()).await;
    let Some(suite) = Suite::of(&pool, &service).await else {
        return;
    };
    proxy.set(Network::Down);
    suite.run("outage.During").await;
    assert_eq!(count(&pool, "charges").await, 0);
    proxy.set(Network::Well);
    suite.run("outage.After").await;
    assert_eq!(count(&pool, "charges").await, 1);
}
