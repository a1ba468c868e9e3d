//! The scenarios: what is done to the service and its database while the storm
//! blows, each with two replicas.

use std::{
    fmt,
    path::PathBuf,
    pin::Pin,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use serde_json::Value;
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool, postgres::PgConnectOptions};
use tokio::{process::Command, time::sleep};

use crate::{
    history::{self, Verdict},
    support::{
        make_account,
        pgbouncer::PgBouncer,
        postgres::Cluster,
        process::{BINARY, Process},
        proxy::{Network, Proxy},
    },
};

type Scenario = fn(Arc<Cluster>, Duration) -> Pin<Box<dyn Future<Output = Outcome> + Send>>;

macro_rules! scenarios {
    ($($name:literal => $function:ident,)*) => {
        /// All of them, in the order in which they run.
        pub const SCENARIOS: &[(&str, Scenario)] =
            &[$(($name, |cluster, time| Box::pin($function(cluster, time)))),*];
    };
}

scenarios! {
    "no fault but the storm's" => quiet,
    "replicas killed by SIGKILL every second" => killed,
    "replicas ended by SIGTERM in mid-load" => terminated,
    "PostgreSQL restarted, fast and immediate" => restarted,
    "connection to PostgreSQL cut" => cut,
    "connection to PostgreSQL silent for 3 s" => silent,
    "connection to PostgreSQL slowed" => slowed,
    "replica stopped for 5 s in mid-transaction" => stopped,
    "disk of PostgreSQL full" => disk_full,
    "connections exhausted" => exhausted,
    "clock of a replica an hour ahead" => clock,
    "purge all the time, answers kept for 1 s" => purged,
    "PgBouncer in between, PostgreSQL restarted" => pooled,
}

/// How a scenario ended.
pub enum Outcome {
    Ran(Row),
    /// This machine cannot do it, and why.
    NotHere(String),
    Failed(String),
}

/// What the storms of a scenario found, added up.
#[derive(Debug, Default)]
pub struct Row {
    seconds: f64,
    faults: u64,
    requests: u64,
    charges: u64,
    counts: [u64; 4],
    tables: u64,
    /// Of histories that are not in order, why.
    histories: Vec<String>,
    /// What else has to hold in this scenario, and does not.
    complaints: Vec<String>,
}

impl Row {
    pub fn add(&mut self, other: &Self) {
        self.seconds += other.seconds;
        self.faults += other.faults;
        self.requests += other.requests;
        self.charges += other.charges;
        for (sum, count) in self.counts.iter_mut().zip(other.counts) {
            *sum += count;
        }
        self.tables += other.tables;
        self.histories.extend(other.histories.iter().cloned());
        self.complaints.extend(other.complaints.iter().cloned());
    }

    pub fn verdict(&self) -> Result<(), String> {
        if self.counts != [0; 4] || self.tables > 0 {
            return Err(format!(
                "double, lost, differing, unanswered: {:?}; tables: {}",
                self.counts, self.tables
            ));
        }
        if let Some(why) = self.histories.iter().chain(&self.complaints).next() {
            return Err(why.clone());
        }
        if self.faults == 0 {
            return Err("its fault did not happen, so nothing was tested".to_owned());
        }
        Ok(())
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [double, lost, differing, unanswered] = self.counts;
        let history = if self.histories.is_empty() {
            "in order"
        } else {
            "BROKEN"
        };
        write!(
            f,
            "{:.0} | {} | {} | {} | {double} | {lost} | {differing} | {unanswered} | {} | {history}",
            self.seconds, self.faults, self.requests, self.charges, self.tables
        )
    }
}

/// A replica that keeps its address through its restarts.
struct Replica {
    url: String,
    settings: Vec<(String, String)>,
    process: Option<Process>,
    address: String,
}

impl Replica {
    async fn start(name: &str, options: &PgConnectOptions, settings: &[(&str, &str)]) -> Self {
        let mut url = options.to_url_lossy();
        url.query_pairs_mut().append_pair("application_name", name);
        let url = url.to_string();
        let process = Process::serve_with(&url, settings).await;
        let address = process.address.clone();
        let mut settings: Vec<_> = settings
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        settings.push(("LISTEN_ADDR".to_owned(), address.clone()));
        Self {
            url,
            settings,
            process: Some(process),
            address,
        }
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("it runs between two faults")
    }

    /// As a supervisor would: again and again until it stays.
    async fn restart(&mut self) {
        let settings: Vec<_> = self
            .settings
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        while self.process.is_none() {
            self.process = Process::try_serve(&self.url, &settings).await;
        }
    }
}

/// Two replicas, an account, and the way to the tables.
struct World {
    replicas: [Replica; 2],
    api_key: String,
    direct: PgConnectOptions,
    pool: PgPool,
    account_id: payonce::ids::AccountId,
}

impl World {
    /// The replicas reach the database by `way`, everybody else directly.
    async fn new(
        cluster: &Cluster,
        way: impl FnOnce(&PgConnectOptions) -> PgConnectOptions,
        settings: &[(&str, &str)],
    ) -> Self {
        let pool = cluster.pool().await;
        let direct = (*pool.connect_options()).clone();
        let way = way(&direct);
        let (account_id, api_key) = make_account(&pool).await;
        let (one, other) = tokio::join!(
            Replica::start("replica-0", &way, settings),
            Replica::start("replica-1", &way, settings)
        );
        Self {
            replicas: [one, other],
            api_key,
            direct,
            pool,
            account_id,
        }
    }

    async fn plain(cluster: &Cluster) -> Self {
        Self::new(cluster, Clone::clone, &[]).await
    }

    fn storms(&self, time: Duration) -> Storms {
        Storms {
            targets: self
                .replicas
                .iter()
                .map(|replica| format!("http://{}", replica.address))
                .collect(),
            api_key: self.api_key.clone(),
            url: self.direct.to_url_lossy().to_string(),
            time,
            arguments: vec![],
            stop: Arc::default(),
        }
    }
}

/// Storms, one after the other, until the time is over.
struct Storms {
    targets: Vec<String>,
    api_key: String,
    url: String,
    time: Duration,
    arguments: Vec<&'static str>,
    /// Set when they are over, for whoever makes faults meanwhile.
    stop: Arc<AtomicBool>,
}

impl Storms {
    fn over(&self) -> impl Fn() -> bool + use<> {
        let stop = Arc::clone(&self.stop);
        move || stop.load(Ordering::SeqCst)
    }

    async fn blow(self) -> (Row, Vec<Value>) {
        let started = Instant::now();
        let (mut row, mut reports) = (Row::default(), Vec::new());
        while started.elapsed() < self.time {
            let report = self.blow_once(&mut row).await;
            reports.extend(report);
        }
        self.stop.store(true, Ordering::SeqCst);
        row.seconds = started.elapsed().as_secs_f64();
        (row, reports)
    }

    async fn blow_once(&self, row: &mut Row) -> Option<Value> {
        // In a long run the storms are long too: the audit is a part of each.
        let (customers, concurrency) = if self.time > Duration::from_secs(20) {
            ("3000", "128")
        } else {
            ("200", "32")
        };
        let history =
            std::env::temp_dir().join(format!("payonce-chaos-{}.jsonl", std::process::id()));
        let mut command = Command::new(BINARY);
        command.args([
            "storm",
            "--json",
            "--concurrency",
            concurrency,
            "--customers",
            customers,
        ]);
        for target in &self.targets {
            command.args(["--target", target]);
        }
        let output = command
            .args(["--database-url", &self.url])
            .arg("--history")
            .arg(&history)
            .args(&self.arguments)
            .env("PAYONCE_API_KEY", &self.api_key)
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let Ok(report) = serde_json::from_slice::<Value>(&output.stdout) else {
            row.complaints.push(format!("the storm broke off: {said}"));
            return None;
        };
        let count = |name: &str| report[name].as_u64().unwrap_or(u64::MAX);
        row.requests += count("requests_sent");
        row.charges += count("charges_made");
        for (sum, name) in row.counts.iter_mut().zip([
            "double_charges",
            "lost_charges",
            "differing_answers",
            "unanswered_keys",
        ]) {
            *sum += count(name);
        }
        row.tables += report["table_findings"].as_array().map_or(1, Vec::len) as u64;
        if !output.status.success() {
            eprintln!("{said}{report}");
        }
        match tokio::task::spawn_blocking(move || (history::check(&history), history))
            .await
            .unwrap()
        {
            (Verdict::Linearizable, history) => std::fs::remove_file(history).unwrap(),
            (verdict, history) => {
                row.histories.push(format!(
                    "the history {} is {verdict:?}; {}",
                    history.display(),
                    said.trim()
                ));
            }
        }
        Some(report)
    }
}

/// Requests of a kind of answer, over all reports.
fn answers(reports: &[Value], kind: &str) -> u64 {
    reports
        .iter()
        .filter_map(|report| report["answers_by_status"][kind].as_u64())
        .sum()
}

/// The storm's own faults alone: dropped, cut, duplicated and the like.
async fn quiet(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let world = World::plain(&cluster).await;
    let (mut row, reports) = world.storms(time).blow().await;
    row.faults = reports
        .iter()
        .map(|report| {
            report["requests_sent"].as_u64().unwrap()
                - report["requests_by_fate"]["passed"].as_u64().unwrap()
        })
        .sum();
    Outcome::Ran(row)
}

async fn killed(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let mut world = World::plain(&cluster).await;
    let storms = world.storms(time);
    let over = storms.over();
    let kills = async {
        let mut count = 0;
        while !over() {
            let replica = &mut world.replicas[usize::from(count % 2 == 1)];
            replica.process().kill().await;
            replica.process = None;
            replica.restart().await;
            count += 1;
            sleep(Duration::from_secs(1)).await;
        }
        count
    };
    let ((mut row, _), kills) = tokio::join!(storms.blow(), kills);
    row.faults = kills;
    Outcome::Ran(row)
}

/// The storm makes no faults of its own here, so whatever goes wrong is the
/// shutdown's: no work may be done whose answer reaches nobody, and no request
/// that reaches a replica may be told 5xx.
async fn terminated(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let mut world = World::plain(&cluster).await;
    let mut storms = world.storms(time);
    storms.arguments = vec![
        "--delay",
        "0",
        "--drop",
        "0",
        "--cut",
        "0",
        "--bad-gateway",
        "0",
        "--duplicate",
        "0",
        "--switch",
        "1",
    ];
    let over = storms.over();
    let terminations = async {
        let (mut count, mut unclean) = (0, 0);
        while !over() {
            let replica = &mut world.replicas[usize::from(count % 2 == 1)];
            if let Some(process) = replica.process.take()
                && !process.terminate().await.success()
            {
                unclean += 1;
            }
            replica.restart().await;
            count += 1;
            sleep(Duration::from_millis(300)).await;
        }
        (count, unclean)
    };
    let ((mut row, reports), (count, unclean)) = tokio::join!(storms.blow(), terminations);
    row.faults = count;
    let lost: u64 = reports
        .iter()
        .filter_map(|report| report["first_answers_lost"].as_u64())
        .sum();
    let refused = answers(&reports, "409 or 5xx");
    if (lost, refused, unclean) != (0, 0, 0) {
        row.complaints.push(format!(
            "{lost} requests were done whose answer reached nobody, {refused} were told 409 or 5xx, {unclean} of {count} replicas did not end with 0"
        ));
    }
    Outcome::Ran(row)
}

async fn restarted(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let world = World::plain(&cluster).await;
    let storms = world.storms(time);
    let (row, restarts) = restarts_during(&cluster, storms).await;
    Outcome::Ran(Row {
        faults: restarts,
        ..row
    })
}

async fn restarts_during(cluster: &Cluster, storms: Storms) -> (Row, u64) {
    let over = storms.over();
    let restarts = async {
        let mut count = 0;
        while !over() {
            cluster
                .restart(if count % 2 == 0 { "immediate" } else { "fast" })
                .await;
            count += 1;
            sleep(Duration::from_secs(1)).await;
        }
        count
    };
    let ((row, _), restarts) = tokio::join!(storms.blow(), restarts);
    (row, restarts)
}

/// The network between the replicas and PostgreSQL is `bad` for a while, well
/// for a while, and so on.
async fn network(
    cluster: &Cluster,
    time: Duration,
    bad: Network,
    bad_for: Duration,
    well_for: Duration,
) -> Outcome {
    let proxy = Proxy::to(&cluster.pool().await).await;
    let world = World::new(cluster, |direct| proxy.options(direct), &[]).await;
    let storms = world.storms(time);
    let over = storms.over();
    let faults = async {
        let mut count = 0;
        while !over() {
            proxy.set(bad);
            count += 1;
            sleep(bad_for).await;
            proxy.set(Network::Well);
            sleep(well_for).await;
        }
        count
    };
    let ((mut row, _), faults) = tokio::join!(storms.blow(), faults);
    row.faults = faults;
    Outcome::Ran(row)
}

async fn cut(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    network(
        &cluster,
        time,
        Network::Down,
        Duration::from_millis(100),
        Duration::from_millis(400),
    )
    .await
}

async fn silent(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    network(
        &cluster,
        time,
        Network::Silent,
        Duration::from_secs(3),
        Duration::from_secs(1),
    )
    .await
}

async fn slowed(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let slow = Network::Slow(Duration::from_millis(30));
    network(
        &cluster,
        time,
        slow,
        Duration::from_secs(2),
        Duration::from_millis(200),
    )
    .await
}

async fn stopped(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let mut world = World::plain(&cluster).await;
    let storms = world.storms(time.max(Duration::from_secs(8)));
    let over = storms.over();
    let pool = world.pool.clone();
    let stops = async {
        let mut count = 0;
        while !over() {
            let i = u8::from(count % 2 == 1);
            let name = format!("replica-{i}");
            let process = world.replicas[usize::from(i)].process();
            process.signal("STOP").await;
            // A statement that runs comes to its end without the replica, and
            // the transaction then waits for it.
            let in_transaction: bool = sqlx::query_scalar(
                "select exists (select from pg_stat_activity
                 where application_name = $1 and xact_start is not null)",
            )
            .bind(&name)
            .fetch_one(&pool)
            .await
            .unwrap();
            if in_transaction {
                count += 1;
                sleep(Duration::from_secs(5)).await;
            }
            process.signal("CONT").await;
            sleep(Duration::from_millis(if in_transaction { 1000 } else { 3 })).await;
        }
        count
    };
    let ((mut row, _), stops) = tokio::join!(storms.blow(), stops);
    row.faults = stops;
    Outcome::Ran(row)
}

/// The tables stand on a small file system of their own, which fills up: the
/// disk with the log does not, since that would only be one more crash.
async fn disk_full(_: Arc<Cluster>, time: Duration) -> Outcome {
    let cluster = Cluster::start("chaos-disk").await;
    let Some(disk) = SmallDisk::mount(&cluster.pool().await).await else {
        return Outcome::NotHere("mounting a small disk takes root".to_owned());
    };
    let world = World::plain(&cluster).await;
    let location = disk.path.join("tables");
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "create tablespace small location '{}'",
        location.display()
    )))
    .execute(&world.pool)
    .await
    .unwrap();
    for object in [
        "table charges",
        "table idempotency_keys",
        "index charges_pkey",
        "index charges_idempotency_key_key",
        "index idempotency_keys_pkey",
        "index idempotency_keys_expires_at_idx",
    ] {
        let statement = format!("alter {object} set tablespace small");
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
            .execute(&world.pool)
            .await
            .unwrap();
    }
    let storms = world.storms(time);
    let over = storms.over();
    let fills = async {
        while !over() {
            disk.fill();
            sleep(Duration::from_millis(700)).await;
            disk.free();
            sleep(Duration::from_millis(700)).await;
        }
    };
    let ((mut row, reports), ()) = tokio::join!(storms.blow(), fills);
    // Not how often it was full, but how often that was felt.
    row.faults = answers(&reports, "409 or 5xx");
    world.pool.close().await;
    drop((world, cluster));
    disk.unmount().await;
    Outcome::Ran(row)
}

struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    async fn mount(pool: &PgPool) -> Option<Self> {
        let data: String = sqlx::query_scalar("show data_directory")
            .fetch_one(pool)
            .await
            .unwrap();
        let path = std::env::temp_dir().join(format!("payonce-small-disk-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=512m,mode=755", "tmpfs"])
            .arg(&path)
            .stderr(Stdio::null())
            .status()
            .await;
        if !mounted.is_ok_and(|status| status.success()) {
            let _ = std::fs::remove_dir(&path);
            return None;
        }
        let tables = path.join("tables");
        std::fs::create_dir(&tables).unwrap();
        let owner = format!("--reference={data}");
        assert!(
            Command::new("chown")
                .arg(&owner)
                .arg(&tables)
                .status()
                .await
                .unwrap()
                .success()
        );
        Some(Self { path })
    }

    fn fill(&self) {
        use std::io::Write;
        let mut ballast = std::fs::File::create(self.path.join("ballast")).unwrap();
        let block = vec![0; 1 << 16];
        while ballast.write_all(&block).is_ok() {}
        while ballast.write_all(&block[..512]).is_ok() {}
    }

    fn free(&self) {
        std::fs::remove_file(self.path.join("ballast")).unwrap();
    }

    async fn unmount(self) {
        assert!(
            Command::new("umount")
                .arg(&self.path)
                .status()
                .await
                .unwrap()
                .success()
        );
        std::fs::remove_dir(&self.path).unwrap();
    }
}

/// Somebody else takes every connection, those of the replicas too.
async fn exhausted(_: Arc<Cluster>, time: Duration) -> Outcome {
    let cluster = Cluster::start_with("chaos-few", &["-c", "max_connections=20"]).await;
    let world = World::new(&cluster, Clone::clone, &[("POOL_SIZE", "3")]).await;
    let storms = world.storms(time);
    let over = storms.over();
    let (direct, pool) = (world.direct.clone(), world.pool.clone());
    let hogs = async {
        let mut count = 0;
        while !over() {
            let mut taken = Vec::new();
            let end = Instant::now() + Duration::from_millis(700);
            while Instant::now() < end {
                let more = join_all((0..10).map(|_| PgConnection::connect_with(&direct))).await;
                let none_is_left = more.iter().any(Result::is_err);
                taken.extend(more.into_iter().flatten());
                if none_is_left {
                    // Now those of the replicas.
                    count += 1;
                    let _ = sqlx::query(
                        "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'replica-%'",
                    )
                    .execute(&pool)
                    .await;
                }
            }
            drop(taken);
            sleep(Duration::from_millis(700)).await;
        }
        count
    };
    let ((mut row, _), hogs) = tokio::join!(storms.blow(), hogs);
    row.faults = hogs;
    world.pool.close().await;
    Outcome::Ran(row)
}

async fn clock(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/faketime");
    let output = Command::new(script)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .await
        .unwrap();
    if !output.status.success() {
        return Outcome::NotHere("another clock takes libfaketime".to_owned());
    }
    let library = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let mut world = World::plain(&cluster).await;
    let ahead = [
        ("LD_PRELOAD", library.as_str()),
        ("FAKETIME", "+3600s"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
    ];
    world.replicas[1] = Replica::start("replica-1", &world.direct, &ahead).await;
    let (mut row, _) = world.storms(time).blow().await;
    let ahead: i64 = sqlx::query_scalar(
        "select count(*) from charges where account_id = $1 and created_at > now() + interval '30 minutes'",
    )
    .bind(world.account_id.0)
    .fetch_one(&world.pool)
    .await
    .unwrap();
    row.faults = ahead.cast_unsigned();
    Outcome::Ran(row)
}

async fn purged(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let world = World::new(
        &cluster,
        Clone::clone,
        &[("ANSWER_TTL", "1s"), ("PURGE_INTERVAL", "100ms")],
    )
    .await;
    let (mut row, _) = world.storms(time).blow().await;
    let gone: i64 = sqlx::query_scalar(
        "select (select count(*) from charges where account_id = $1)
              - (select count(*) from idempotency_keys where account_id = $1)",
    )
    .bind(world.account_id.0)
    .fetch_one(&world.pool)
    .await
    .unwrap();
    row.faults = gone.cast_unsigned();
    Outcome::Ran(row)
}

async fn pooled(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let Some(pgbouncer) = PgBouncer::before(&cluster.pool().await).await else {
        return Outcome::NotHere("PgBouncer is missing".to_owned());
    };
    let world = World::new(
        &cluster,
        |direct| pgbouncer.options(direct),
        &[("TRANSACTION_POOLER", "true")],
    )
    .await;
    let storms = world.storms(time);
    let (row, restarts) = restarts_during(&cluster, storms).await;
    Outcome::Ran(Row {
        faults: restarts,
        ..row
    })
}
