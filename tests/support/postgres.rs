//! A PostgreSQL that a test owns: it may be stopped, crashed and restarted,
//! which the one behind `DATABASE_URL` never is.

use std::process::{Command, Stdio};

use payonce::MIGRATOR;
use sqlx::{PgPool, postgres::PgPoolOptions};

/// A private cluster, removed at the end.
pub struct Cluster {
    name: String,
    pub url: String,
}

impl Cluster {
    /// A new one, with our tables.
    pub async fn start(name: &str) -> Self {
        Self::start_with(name, &[]).await
    }

    /// The same with settings of its own: `-c name=value`.
    pub async fn start_with(name: &str, settings: &[&str]) -> Self {
        // A test that was killed may have left one of the same name behind.
        script(&["remove", name]);
        let url = script(&[&["start", name], settings].concat());
        let cluster = Self {
            name: name.to_owned(),
            url,
        };
        MIGRATOR.run(&cluster.pool().await).await.unwrap();
        cluster
    }

    /// A pool of the test's own, for looking.
    pub async fn pool(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(4)
            .connect(&self.url)
            .await
            .unwrap()
    }

    /// `fast` or `immediate`, which is a crash. Comes back when it runs again.
    pub async fn restart(&self, mode: &'static str) {
        let name = self.name.clone();
        let url = blocking(move || script(&["restart", &name, mode])).await;
        assert_eq!(url, self.url, "a restarted server is where it was");
    }
}

/// Standbys.
impl Cluster {
    /// A hot standby of this cluster, by streaming replication, that knows
    /// itself by `name`; the primary waits for it once `wait_for_standbys` said so.
    pub async fn standby(&self, name: &str) -> Self {
        let (standby, primary) = (name.to_owned(), self.name.clone());
        let url = blocking(move || {
            script(&["remove", &standby]);
            script(&["standby", &standby, &primary])
        })
        .await;
        Self {
            name: name.to_owned(),
            url,
        }
    }

    /// Each COMMIT waits for any one of the standbys from now on.
    pub async fn wait_for_standbys(&self) {
        self.set_standby_names("*").await;
        let pool = self.pool().await;
        let waits = || async {
            sqlx::query_scalar(
                "select current_setting('synchronous_standby_names') = '*'
                    and exists (select from pg_stat_replication where sync_state = 'sync')",
            )
            .fetch_one(&pool)
            .await
            .unwrap()
        };
        super::eventually("the standby is synchronous", waits).await;
    }

    /// Comes back when new sessions have it; those that are there learn it with their next
    /// statement.
    pub async fn set_standby_names(&self, names: &'static str) {
        let pool = self.pool().await;
        let set = sqlx::AssertSqlSafe(format!(
            "alter system set synchronous_standby_names = '{names}'"
        ));
        for statement in [sqlx::query(set), sqlx::query("select pg_reload_conf()")] {
            statement.execute(&pool).await.unwrap();
        }
        let is_set = || async {
            let now: String = sqlx::query_scalar("show synchronous_standby_names")
                .fetch_one(&pool)
                .await
                .unwrap();
            now == names
        };
        super::eventually("the names are set", is_set).await;
    }

    /// Kills one of the backends of the sessions with this application name, if there
    /// is one: the server ends all others, and recovers as from a crash.
    pub async fn kill_a_backend(&self, application_name: &str) -> bool {
        let pid: Option<i32> = sqlx::query_scalar(
            "select pid from pg_stat_activity where application_name = $1 order by random() limit 1",
        )
        .bind(application_name)
        .fetch_optional(&self.pool().await)
        .await
        .unwrap();
        pid.is_some_and(|pid| {
            super::process::send_signal(Some(pid.cast_unsigned()), rustix::process::Signal::KILL)
                .is_ok()
        })
    }

    /// `fast` or `immediate`, which is a crash.
    pub async fn stop(&self, mode: &'static str) {
        let name = self.name.clone();
        blocking(move || script(&["stop", &name, mode])).await;
    }

    /// Runs again, where it was.
    pub async fn start_again(&self) {
        let name = self.name.clone();
        let url = blocking(move || script(&["start", &name])).await;
        assert_eq!(
            url, self.url,
            "a server that is started again is where it was"
        );
    }

    /// Makes a primary of a standby.
    pub async fn promote(&self) {
        let promoted: bool = sqlx::query_scalar("select pg_promote()")
            .fetch_one(&self.pool().await)
            .await
            .unwrap();
        assert!(promoted);
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        script(&["remove", &self.name]);
    }
}

fn script(arguments: &[&str]) -> String {
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/postgres"))
        .arg("cluster")
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "scripts/postgres cluster {arguments:?} failed"
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
