//! The scenarios: what is done to the service and its database while the storm
//! blows, each with two replicas.

use std::{
    fmt,
    path::PathBuf,
    pin::Pin,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use serde_json::Value;
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool, postgres::PgConnectOptions};
use tokio::{
    process::Command,
    time::{sleep, timeout},
};

use crate::{
    history::{self, Verdict},
    support::{
        make_account,
        pgbouncer::PgBouncer,
        postgres::Cluster,
        process::{BINARY, Process, Signal},
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
    "clocks of the replicas an hour ahead and behind" => clocks,
    "purge all the time, answers kept for 1 s" => purged,
    "PgBouncer in between, PostgreSQL restarted" => pooled,
    "synchronous standby, backends of the primary killed" => backends_killed,
    "synchronous standby, primary crashes and is lost, standby promoted" => primaries_lost,
    "synchronous standby away" => standby_away,
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
    /// Of those, how many were told to come again, and how many were sent and
    /// told nothing: their connection broke off.
    put_off: u64,
    broken_off: u64,
    charges: u64,
    /// Captures and refunds that were done.
    changes: u64,
    counts: [u64; 5],
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
        self.put_off += other.put_off;
        self.broken_off += other.broken_off;
        self.charges += other.charges;
        self.changes += other.changes;
        for (sum, count) in self.counts.iter_mut().zip(other.counts) {
            *sum += count;
        }
        self.tables += other.tables;
        self.histories.extend(other.histories.iter().cloned());
        self.complaints.extend(other.complaints.iter().cloned());
    }

    pub fn verdict(&self) -> Result<(), String> {
        if self.counts != [0; 5] || self.tables > 0 {
            return Err(format!(
                "double, lost, miscounted, differing, unanswered: {:?}; tables: {}",
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
        let [double, lost, miscounted, differing, unanswered] = self.counts;
        let history = if self.histories.is_empty() {
            "in order"
        } else {
            "BROKEN"
        };
        write!(
            f,
            "{:.0} | {} | {} | {} | {} | {} | {} | {double} | {lost} | {miscounted} | {differing} | {unanswered} | {} | {history}",
            self.seconds,
            self.faults,
            self.requests,
            self.put_off,
            self.broken_off,
            self.charges,
            self.changes,
            self.tables
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
        let address = free_address();
        let settings: Vec<_> = settings
            .iter()
            .chain(&[("LISTEN_ADDR", address.as_str())])
            .copied()
            .collect();
        Self {
            process: Some(Process::serve_with(url.as_str(), &settings).await),
            url: url.to_string(),
            settings: settings
                .iter()
                .map(|&(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
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

/// Below the ports that systems give to outgoing connections, one of which could
/// otherwise take the place of a replica that is down.
fn free_address() -> String {
    loop {
        let address = format!("127.0.0.1:{}", rand::random_range(10_000..20_000));
        if std::net::TcpListener::bind(&address).is_ok() {
            return address;
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
            url: Some(self.direct.to_url_lossy().to_string()),
            time,
            arguments: vec![],
            charges_max: u64::MAX,
            watch: Watch::default(),
        }
    }
}

/// Storms, one after the other, until the time is over.
struct Storms {
    targets: Vec<String>,
    api_key: String,
    /// Where the tables are, to be audited as well.
    url: Option<String>,
    time: Duration,
    arguments: Vec<&'static str>,
    /// No more storms after so many charges.
    charges_max: u64,
    watch: Watch,
}

/// A storm that takes longer has met a service that does not answer any more.
const STORM_MAX: Duration = Duration::from_mins(10);

/// What the storms, and whoever makes faults meanwhile, tell each other.
#[derive(Clone, Default)]
struct Watch {
    over: Arc<AtomicBool>,
    faults: Arc<AtomicU64>,
}

impl Watch {
    fn over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// One more fault has been made.
    fn fault(&self) {
        self.faults.fetch_add(1, Ordering::SeqCst);
    }

    fn faults(&self) -> u64 {
        self.faults.load(Ordering::SeqCst)
    }
}

impl Storms {
    /// Until the time is over.
    async fn blow(self) -> (Row, Vec<Value>) {
        self.blow_until(|_| true).await
    }

    /// Until the time is over and a fault has been made.
    async fn blow_until_a_fault(self) -> (Row, Vec<Value>) {
        let watch = self.watch.clone();
        let (mut row, reports) = self.blow_until(|_| watch.faults() > 0).await;
        row.faults = watch.faults();
        (row, reports)
    }

    /// A fault takes its time on a slow machine, so the storms go on until it
    /// `happened`, for ten times as long if need be.
    async fn blow_until(self, happened: impl Fn(&Row) -> bool) -> (Row, Vec<Value>) {
        let started = Instant::now();
        let (mut row, mut reports) = (Row::default(), Vec::new());
        loop {
            let report = self.blow_once(&mut row).await;
            reports.extend(report);
            let done = started.elapsed() >= self.time || row.charges >= self.charges_max;
            if done && (happened(&row) || started.elapsed() >= self.time * 10) {
                break;
            }
        }
        self.watch.over.store(true, Ordering::SeqCst);
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
        if let Some(url) = &self.url {
            command.args(["--database-url", url]);
        }
        command
            .args(["--seed", &next_seed().to_string()])
            .arg("--history")
            .arg(&history)
            .args(&self.arguments)
            .env("PAYONCE_API_KEY", &self.api_key)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let Ok(output) = timeout(STORM_MAX, command.output()).await else {
            row.complaints.push("the storm does not end".to_owned());
            return None;
        };
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let Ok(report) = serde_json::from_slice::<Value>(&output.stdout) else {
            row.complaints.push(format!("the storm broke off: {said}"));
            return None;
        };
        let count = |name: &str| report[name].as_u64().unwrap_or(u64::MAX);
        row.requests += count("requests_sent");
        row.charges += count("charges_made");
        row.changes += count("captures_made") + count("refunds_made");
        for (status, count) in report["answers_by_status"]
            .as_object()
            .into_iter()
            .flatten()
        {
            let count = count.as_u64().unwrap_or_default();
            match status.as_str() {
                "409" | "503" => row.put_off += count,
                "none" => row.broken_off += count,
                // 400 is what a charge does not allow.
                "200" | "400" | "402" | "422" | "not reached" => {}
                // 500 is a bug of ours, and none of the storm's requests deserves
                // another 4xx.
                other => row.complaints.push(format!(
                    "{count} requests were told {other}; {}",
                    said.trim()
                )),
            }
        }
        for (sum, names) in row.counts.iter_mut().zip([
            &["double_charges", "double_captures", "double_refunds"][..],
            &["lost_charges", "lost_captures", "lost_refunds"],
            &[
                "captures_beyond_amount",
                "refunds_beyond_captured",
                "refunds_not_adding_up",
                "wrong_refusals",
            ],
            &["differing_answers"],
            &["unanswered_keys"],
        ]) {
            *sum += names.iter().map(|name| count(name)).sum::<u64>();
        }
        if self.url.is_some() {
            row.tables += report["table_findings"].as_array().map_or(1, Vec::len) as u64;
        }
        if !output.status.success() {
            eprintln!("{said}{report}");
        }
        let expire = self.arguments.contains(&"--answers-expire");
        let checked =
            tokio::task::spawn_blocking(move || (history::check(&history, expire), history));
        match checked.await.unwrap() {
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

/// The seed of the first storm; each next one has the next.
static SEED: AtomicU64 = AtomicU64::new(0);

pub fn start_with_seed(seed: u64) {
    SEED.store(seed, Ordering::SeqCst);
}

fn next_seed() -> u64 {
    SEED.fetch_add(1, Ordering::SeqCst)
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
    let watch = storms.watch.clone();
    let kills = async {
        while !watch.over() {
            // The one, the other, both.
            let victims = match watch.faults() % 3 {
                0 => &mut world.replicas[..1],
                1 => &mut world.replicas[1..],
                _ => &mut world.replicas[..],
            };
            for replica in &mut *victims {
                replica.process().kill().await;
                replica.process = None;
            }
            for replica in victims {
                replica.restart().await;
            }
            watch.fault();
            sleep(Duration::from_secs(1)).await;
        }
    };
    let ((row, _), ()) = tokio::join!(storms.blow_until_a_fault(), kills);
    Outcome::Ran(row)
}

/// The storm makes no faults of its own here, so whatever goes wrong is the
/// shutdown's: no work may be done whose answer reaches nobody, and no request
/// that reaches a replica may be told 5xx.
async fn terminated(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    // A double click on a slow machine is no fault of the shutdown's.
    let patient = [("DUPLICATE_WAIT", "10s")];
    let mut world = World::new(&cluster, Clone::clone, &patient).await;
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
    let watch = storms.watch.clone();
    let terminations = async {
        let mut unclean = 0;
        while !watch.over() {
            let replica = &mut world.replicas[usize::from(watch.faults() % 2 == 1)];
            if let Some(process) = replica.process.take()
                && !process.terminate().await.success()
            {
                unclean += 1;
            }
            replica.restart().await;
            watch.fault();
            sleep(Duration::from_millis(300)).await;
        }
        unclean
    };
    let ((mut row, reports), unclean) = tokio::join!(storms.blow_until_a_fault(), terminations);
    let lost: u64 = reports
        .iter()
        .filter_map(|report| report["first_answers_lost"].as_u64())
        .sum();
    if (lost, row.put_off, unclean) != (0, 0, 0) {
        row.complaints.push(format!(
            "{lost} requests were done whose answer reached nobody, {} were told 409 or 503, {unclean} of {} replicas did not end with 0",
            row.put_off, row.faults
        ));
    }
    Outcome::Ran(row)
}

async fn restarted(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let world = World::plain(&cluster).await;
    Outcome::Ran(restarts_during(&cluster, world.storms(time)).await)
}

async fn restarts_during(cluster: &Cluster, storms: Storms) -> Row {
    let watch = storms.watch.clone();
    let restarts = async {
        while !watch.over() {
            cluster
                .restart(if watch.faults().is_multiple_of(2) {
                    "immediate"
                } else {
                    "fast"
                })
                .await;
            watch.fault();
            sleep(Duration::from_secs(1)).await;
        }
    };
    let ((row, _), ()) = tokio::join!(storms.blow_until_a_fault(), restarts);
    row
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
    let watch = storms.watch.clone();
    let faults = async {
        while !watch.over() {
            proxy.set(bad);
            watch.fault();
            sleep(bad_for).await;
            proxy.set(Network::Well);
            sleep(well_for).await;
        }
    };
    let ((row, _), ()) = tokio::join!(storms.blow_until_a_fault(), faults);
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
    let watch = storms.watch.clone();
    let pool = world.pool.clone();
    let stops = async {
        while !watch.over() {
            let i = usize::from(watch.faults() % 2 == 1);
            let name = format!("replica-{i}");
            let process = world.replicas[i].process();
            process.signal(Signal::STOP);
            let in_transaction = is_in_transaction(&pool, &name).await;
            if in_transaction {
                watch.fault();
                sleep(Duration::from_secs(5)).await;
            }
            process.signal(Signal::CONT);
            sleep(Duration::from_millis(if in_transaction { 1000 } else { 3 })).await;
        }
    };
    let ((row, _), ()) = tokio::join!(storms.blow_until_a_fault(), stops);
    Outcome::Ran(row)
}

/// Whether this replica, which has been stopped, is in the middle of a
/// transaction. A statement that runs comes to its end without the replica:
/// read and COMMIT are over then, any other waits for the next.
async fn is_in_transaction(pool: &PgPool, name: &str) -> bool {
    loop {
        let (running, waiting): (bool, bool) = sqlx::query_as(
            "select coalesce(bool_or(state = 'active'), false),
                    coalesce(bool_or(state = 'idle in transaction'), false)
             from pg_stat_activity where application_name = $1",
        )
        .bind(name)
        .fetch_one(pool)
        .await
        .unwrap();
        if waiting || !running {
            return waiting;
        }
    }
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
        "table refunds",
        "index charges_idempotency_key_key",
        "index refunds_pkey",
        "index refunds_idempotency_key_key",
        "index idempotency_keys_pkey",
        "index idempotency_keys_expires_at_idx",
    ] {
        let statement = format!("alter {object} set tablespace small");
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
            .execute(&world.pool)
            .await
            .unwrap();
    }
    let mut storms = world.storms(time);
    // About half of what it holds, so that it is full only when it is filled.
    storms.charges_max = 100_000;
    let watch = storms.watch.clone();
    let fills = async {
        while !watch.over() {
            disk.fill();
            sleep(Duration::from_millis(700)).await;
            disk.free();
            sleep(Duration::from_millis(700)).await;
        }
    };
    let ((mut row, _), ()) = tokio::join!(storms.blow_until(|row| row.put_off > 0), fills);
    // Not how often it was full, but how often that was felt.
    row.faults = row.put_off;
    world.pool.close().await;
    Outcome::Ran(row)
}

/// Gone when it is dropped, even if somebody still has a file open there.
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
        let disk = Self { path };
        assert!(
            Command::new("chown")
                .arg(&owner)
                .arg(&tables)
                .status()
                .await
                .unwrap()
                .success()
        );
        Some(disk)
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
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("--lazy")
            .arg(&self.path)
            .status();
        let _ = std::fs::remove_dir(&self.path);
    }
}

/// Somebody else takes every connection, those of the replicas too.
async fn exhausted(_: Arc<Cluster>, time: Duration) -> Outcome {
    let cluster = Cluster::start_with("chaos-few", &["-c", "max_connections=20"]).await;
    let world = World::new(&cluster, Clone::clone, &[("POOL_SIZE", "3")]).await;
    let storms = world.storms(time);
    let watch = storms.watch.clone();
    let (direct, pool) = (world.direct.clone(), world.pool.clone());
    let hogs = async {
        while !watch.over() {
            let mut taken = Vec::new();
            while !takes_all(&direct, &mut taken).await {}
            // Now those of the replicas.
            let _ = sqlx::query(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'replica-%'",
            )
            .execute(&pool)
            .await;
            watch.fault();
            let end = Instant::now() + Duration::from_millis(700);
            while Instant::now() < end {
                takes_all(&direct, &mut taken).await;
            }
            drop(taken);
            sleep(Duration::from_millis(700)).await;
        }
    };
    let ((row, _), ()) = tokio::join!(storms.blow_until_a_fault(), hogs);
    world.pool.close().await;
    Outcome::Ran(row)
}

/// Takes ten connections more; whether it was refused one.
async fn takes_all(direct: &PgConnectOptions, taken: &mut Vec<PgConnection>) -> bool {
    let more = join_all((0..10).map(|_| PgConnection::connect_with(direct))).await;
    let refused = more.iter().any(Result::is_err);
    taken.extend(more.into_iter().flatten());
    refused
}

async fn clocks(cluster: Arc<Cluster>, time: Duration) -> Outcome {
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
    for (i, off) in ["-3600s", "+3600s"].into_iter().enumerate() {
        let settings = [
            ("LD_PRELOAD", library.as_str()),
            ("FAKETIME", off),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("DONT_FAKE_MONOTONIC", "1"),
        ];
        world.replicas[i] = Replica::start(&format!("replica-{i}"), &world.direct, &settings).await;
    }
    let (mut row, _) = world.storms(time).blow().await;
    let (behind, ahead): (i64, i64) = sqlx::query_as(
        "select count(*) filter (where created_at < now() - interval '30 minutes'),
                count(*) filter (where created_at > now() + interval '30 minutes')
         from charges where account_id = $1",
    )
    .bind(world.account_id.0)
    .fetch_one(&world.pool)
    .await
    .unwrap();
    if behind == 0 || ahead == 0 {
        row.complaints
            .push("a replica's clock was not wrong".to_owned());
    }
    row.faults = (behind + ahead).cast_unsigned();
    Outcome::Ran(row)
}

async fn purged(cluster: Arc<Cluster>, time: Duration) -> Outcome {
    let world = World::new(
        &cluster,
        Clone::clone,
        &[("RULES", "payment=1s"), ("PURGE_INTERVAL", "100ms")],
    )
    .await;
    let mut storms = world.storms(time);
    storms.arguments = vec!["--answers-expire"];
    let (mut row, _) = storms.blow().await;
    let gone: i64 = sqlx::query_scalar(
        "select count(*)
         from charges left join idempotency_keys as keys
             on keys.account_id = charges.account_id and keys.key = charges.idempotency_key
         where charges.account_id = $1 and keys.key is null",
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
    Outcome::Ran(restarts_during(&cluster, world.storms(time)).await)
}

/// A primary whose COMMITs wait for a standby, and the way to whichever of them is the
/// primary.
struct Pair {
    primary: Cluster,
    standby: Cluster,
    way: Proxy,
    standbys: usize,
}

impl Pair {
    async fn start() -> Self {
        let primary = Cluster::start("chaos-sync-0").await;
        let standby = primary.standby("chaos-sync-1").await;
        primary.wait_for_standbys().await;
        let way = Proxy::to(&primary.pool().await).await;
        Self {
            primary,
            standby,
            way,
            standbys: 1,
        }
    }

    /// Everybody goes by the way, the storm's audit of the tables too: what it finds is
    /// what the servers that are left have.
    async fn world(&self) -> World {
        let mut world = World::new(&self.primary, |direct| self.way.options(direct), &[]).await;
        world.direct = self.way.options(&world.direct);
        world
    }

    /// The primary is lost, and the standby takes over; then it gets a standby of its own.
    async fn fail_over(&mut self) {
        self.primary.stop("immediate").await;
        self.standby.promote().await;
        let pool = self.standby.pool().await;
        self.way.lead_to(&pool);
        pool.close().await;
        self.standbys += 1;
        let next = format!("chaos-sync-{}", self.standbys);
        let next = self.standby.standby(&next).await;
        self.standby.wait_for_standbys().await;
        self.primary = std::mem::replace(&mut self.standby, next);
    }
}

/// The server recovers as from a crash, and shows rows that its standby may lack.
async fn backends_killed(_: Arc<Cluster>, time: Duration) -> Outcome {
    let pair = Pair::start().await;
    let world = pair.world().await;
    let storms = world.storms(time);
    let watch = storms.watch.clone();
    let kills = async {
        while !watch.over() {
            let name = format!("replica-{}", watch.faults() % 2);
            if pair.primary.kill_a_backend(&name).await {
                watch.fault();
            }
            sleep(Duration::from_secs(1)).await;
        }
    };
    let ((row, _), ()) = tokio::join!(storms.blow_until_a_fault(), kills);
    world.pool.close().await;
    Outcome::Ran(row)
}

/// The standby has to have whatever was acknowledged, also what was found again in the
/// moment between the crash of the primary and its loss.
async fn primaries_lost(_: Arc<Cluster>, time: Duration) -> Outcome {
    let mut pair = Pair::start().await;
    let world = pair.world().await;
    let mut storms = world.storms(time);
    // The audit of the tables goes over one connection, which would not survive this;
    // that of the API does.
    storms.url = None;
    let watch = storms.watch.clone();
    let losses = async {
        while !watch.over() {
            let name = format!("replica-{}", watch.faults() % 2);
            if pair.primary.kill_a_backend(&name).await {
                sleep(Duration::from_millis(rand::random_range(200..400))).await;
                pair.fail_over().await;
                watch.fault();
            }
            sleep(Duration::from_secs(1)).await;
        }
    };
    let ((row, _), ()) = tokio::join!(storms.blow_until_a_fault(), losses);
    world.pool.close().await;
    Outcome::Ran(row)
}

/// Longer than a request lives, so that some are told 503; nothing else may come of it,
/// and the connections of the server must not be used up.
async fn standby_away(_: Arc<Cluster>, time: Duration) -> Outcome {
    let away = if time > Duration::from_secs(20) {
        Duration::from_mins(1)
    } else {
        Duration::from_secs(12)
    };
    let pair = Pair::start().await;
    let world = pair.world().await;
    let mut storms = world.storms(time);
    storms.arguments = vec!["--patience", "3m"];
    let watch = storms.watch.clone();
    let faults = async {
        let mut most = 0;
        while !watch.over() {
            pair.standby.stop("fast").await;
            let end = Instant::now() + away;
            while Instant::now() < end {
                let waiting: i64 = sqlx::query_scalar(
                    "select count(*) from pg_stat_activity where wait_event = 'SyncRep'",
                )
                .fetch_one(&world.pool)
                .await
                .unwrap();
                most = most.max(waiting);
                sleep(Duration::from_millis(100)).await;
            }
            pair.standby.start_again().await;
            watch.fault();
            sleep(Duration::from_secs(2)).await;
        }
        most
    };
    let ((mut row, _), most) = tokio::join!(storms.blow_until_a_fault(), faults);
    // Two writing tasks each; the others are the storm's patience, and a slow machine's.
    if most > 8 {
        row.complaints
            .push(format!("{most} connections waited for the standby"));
    }
    world.pool.close().await;
    Outcome::Ran(row)
}
