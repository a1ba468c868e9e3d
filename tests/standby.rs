//! Promise 2 with synchronous replication: what was acknowledged is on the standby
//! too, so that the loss of the primary loses nothing of it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{Request, StatusCode},
    routing::post,
};
use futures::future::join_all;
use payonce::{
    idempotency::{Scenario, purge},
    layer::{Idempotent, Tx},
};
use sqlx::PgPool;
use tower::ServiceExt;

use crate::support::{Reply, Service, Settings, count, eventually, postgres::Cluster};

/// A primary whose COMMITs wait for one standby.
async fn with_standby(name: &str) -> (Cluster, Cluster) {
    let primary = Cluster::start(&format!("test-{name}")).await;
    let standby = primary.standby(&format!("test-{name}-standby")).await;
    primary.wait_for_standbys().await;
    (primary, standby)
}

/// How many COMMITs wait for a standby.
async fn waiting(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from pg_stat_activity where wait_event = 'SyncRep'")
        .fetch_one(pool)
        .await
        .unwrap()
}

async fn somebody_waits(pool: &PgPool) {
    eventually("a COMMIT waits for the standby", || async {
        waiting(pool).await > 0
    })
    .await;
}

/// Sends it again with the same key until it is told an outcome.
async fn until_answered(service: &Service, key: &str) -> Reply {
    loop {
        let reply = service.charge(key).send().await;
        if !matches!(reply.status.as_u16(), 409 | 503) {
            return reply;
        }
    }
}

/// The directed attack: rows that no standby has become visible by a crash restart.
/// Whoever asks for them again must not be told that they are there for good.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_standby_has_is_not_acknowledged_after_a_crash() {
    let (primary, standby) = with_standby("lost").await;
    let pool = primary.pool().await;
    let service = Service::start(&pool).await;
    assert_eq!(service.charge("before").send().await.status, 200);
    standby.stop("immediate").await;

    let keys: Vec<_> = (0..8).map(|i| format!("order_{i}")).collect();
    let requests: Vec<_> = keys
        .iter()
        .map(|key| tokio::spawn(service.charge(key).send()))
        .collect();
    somebody_waits(&pool).await;
    primary.restart("immediate").await;
    let pool = primary.pool().await;
    eventually("the crash has made rows visible", || async {
        count(&pool, "charges").await > 1
    })
    .await;
    // The writer's own repetition, and the client's retry on another replica.
    for request in requests {
        let reply = request.await.unwrap();
        assert!(matches!(reply.status.as_u16(), 409 | 503), "{reply:?}");
    }
    let retry = service.replica().charge("order_0").send().await;
    assert!(matches!(retry.status.as_u16(), 409 | 503), "{retry:?}");

    // The primary is lost, and the standby takes over without the charges.
    primary.stop("immediate").await;
    standby.start_again().await;
    standby.promote().await;
    let promoted = standby.pool().await;
    assert_eq!(count(&promoted, "charges").await, 1);
    let service = service.on(&promoted);
    for key in &keys {
        let reply = service.charge(key).send().await;
        assert_eq!(reply.status, 200, "{reply:?}");
        assert!(!reply.is_replayed());
    }
    assert_eq!(count(&promoted, "charges").await, 9);
}

/// `pg_cancel_backend` ends the wait, COMMIT comes back with a warning, and the row is
/// there for all to see.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_wait_for_the_standby_is_no_acknowledgement() {
    let (primary, standby) = with_standby("cancelled").await;
    let pool = primary.pool().await;
    let service = Service::start(&pool).await;
    standby.stop("fast").await;
    // Again and again, since one request gives up after 10 s.
    let client = service.clone();
    let request = tokio::spawn(async move { until_answered(&client, "order_1").await });
    somebody_waits(&pool).await;
    let cancelled: bool = sqlx::query_scalar(
        "select bool_and(pg_cancel_backend(pid)) from pg_stat_activity where wait_event = 'SyncRep'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(cancelled);
    eventually("the row is visible", || async {
        count(&pool, "charges").await == 1
    })
    .await;
    // The repetition waits as well.
    somebody_waits(&pool).await;
    assert!(!request.is_finished(), "{:?}", request.await);
    standby.start_again().await;
    let reply = request.await.unwrap();
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(count(&pool, "charges").await, 1);
}

/// While the standby is away nothing new is acknowledged, what is known is, and the
/// server is left its connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_away_costs_two_connections_and_no_known_key() {
    let (primary, standby) = with_standby("away").await;
    let pool = primary.pool().await;
    let service = Service::start(&pool).await;
    let known = service.charge("known").send().await;
    let id = known.charge_id();
    // Its second answer is what proves that the standby has it.
    assert_eq!(service.charge("known").send().await.body, known.body);
    let ready = || async { service.get("/readyz").send().await };
    assert_eq!(ready().await.status, 200);

    standby.stop("fast").await;
    let mut told = Vec::new();
    for round in 0..2 {
        let requests: Vec<_> = (0..8)
            .map(|i| tokio::spawn(service.charge(&format!("order_{round}_{i}")).send()))
            .collect();
        eventually("the service is not ready", || async {
            ready().await.status == 503
        })
        .await;
        // Captures, refunds and updates are known by their keys as well as charges.
        for _ in 0..20 {
            let replay = service.charge("known").send().await;
            assert_eq!((replay.status.as_u16(), &replay.body), (200, &known.body));
            assert!(replay.is_replayed());
        }
        for request in requests {
            let reply = request.await.unwrap();
            reply.assert_error(503, "unavailable");
            told.push(reply);
        }
        // One per writing task; two where a slow machine hid the first.
        assert!(waiting(&pool).await <= 4, "connections pile up");
    }
    assert!(
        ready().await.body.contains("standby"),
        "it does not say why"
    );
    standby.start_again().await;
    eventually("the service is ready again", || async {
        ready().await.status == 200
    })
    .await;
    for round in 0..2 {
        for i in 0..8 {
            let reply = until_answered(&service, &format!("order_{round}_{i}")).await;
            assert_eq!(reply.status, 200, "{reply:?}");
        }
    }
    assert_eq!(service.count_charges().await, 17);
    let read = service.get(&format!("/v1/charges/{id}")).send().await;
    assert_eq!(read.body, known.body);
}

/// A process that finds COMMITs waiting when it starts does not add its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_starts_while_the_standby_is_away_waits_beside() {
    let (primary, standby) = with_standby("start").await;
    let pool = primary.pool().await;
    let service = Service::start(&pool).await;
    standby.stop("fast").await;
    let first = tokio::spawn(service.charge("order_1").send());
    eventually("the service is not ready", || async {
        service.get("/readyz").send().await.status == 503
    })
    .await;
    let replicas = join_all((0..4).map(|i| {
        let replica = service.replica();
        let call = replica.charge(&format!("other_{i}"));
        async move {
            let reply = call.send().await;
            drop(replica);
            reply
        }
    }))
    .await;
    for reply in replicas {
        reply.assert_error(503, "unavailable");
    }
    assert_eq!(waiting(&pool).await, 1);
    first.await.unwrap().assert_error(503, "unavailable");
    standby.start_again().await;
    let reply = until_answered(&service, "order_1").await;
    assert_eq!(reply.status, 200);
}

/// Without standbys a replay writes nothing; with them the first one does, and after it
/// the key is known to be safe.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_leaves_one_record_and_only_where_there_are_standbys() {
    let primary = Cluster::start_with("test-record", &["-c", "autovacuum=off"]).await;
    let pool = primary.pool().await;
    let service = Service::start(&pool).await;
    // A record takes a transaction id.
    let next_xid = || async {
        let xid: String =
            sqlx::query_scalar("select pg_snapshot_xmax(pg_current_snapshot())::text")
                .fetch_one(&pool)
                .await
                .unwrap();
        xid.parse::<u64>().unwrap()
    };
    assert_eq!(service.charge("order_1").send().await.status, 200);
    let before = next_xid().await;
    let replays = |n: u64| {
        let service = &service;
        async move {
            for _ in 0..n {
                assert!(service.charge("order_1").send().await.is_replayed());
            }
        }
    };
    replays(3).await;
    assert_eq!(next_xid().await, before, "a replay wrote something");

    let standby = primary.standby("test-record-standby").await;
    primary.wait_for_standbys().await;
    let before = next_xid().await;
    replays(5).await;
    assert_eq!(next_xid().await, before + 1);
    drop(standby);
}

/// A standby answers no reads: what it does not have yet is not missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_answers_nothing() {
    let primary = Cluster::start("test-reads").await;
    let standby = primary.standby("test-reads-standby").await;
    let service = Service::start(&primary.pool().await).await;
    let id = service.charge("order_1").send().await.charge_id();
    let on_standby = service.on(&standby.pool().await);
    for path in [format!("/v1/charges/{id}"), "/v1/charges".to_owned()] {
        assert_eq!(service.get(&path).send().await.status, 200);
        on_standby
            .get(&path)
            .send()
            .await
            .assert_error(503, "unavailable");
    }
    on_standby
        .get("/readyz")
        .send()
        .await
        .assert_error(503, "unavailable");
    // An API key that it has not heard of is not unknown.
    let stranger = on_standby.stranger("GET", "/v1/charges").header(
        "authorization",
        "Bearer sk_test_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    );
    stranger.send().await.assert_error(503, "unavailable");
    // The same replica, once it is the primary.
    standby.promote().await;
    let read = on_standby.get(&format!("/v1/charges/{id}")).send().await;
    assert_eq!(read.status, 200, "{read:?}");
}

/// What `payonce::layer` replays waits for the standby as well.
#[tokio::test(flavor = "multi_thread")]
async fn the_layers_replays_wait_for_the_standby() {
    let (primary, standby) = with_standby("layer").await;
    let pool = primary.pool().await;
    let layer = Idempotent::new(pool, Scenario::Form.default_rule(), |_| {
        Some("ann".to_owned())
    })
    .step_limit(Duration::from_secs(1));
    let done = || async { StatusCode::CREATED };
    let router = Router::new().route("/orders", post(done)).layer(layer);
    let ask = || {
        let request = Request::post("/orders")
            .header("idempotency-key", "order_1")
            .body(Body::empty())
            .unwrap();
        let router = router.clone();
        async move { router.oneshot(request).await.unwrap() }
    };
    assert_eq!(ask().await.status(), StatusCode::CREATED);
    standby.stop("fast").await;
    assert_eq!(ask().await.status(), StatusCode::SERVICE_UNAVAILABLE);
    standby.start_again().await;
    loop {
        let replay = ask().await;
        if replay.status() == StatusCode::CREATED {
            assert_eq!(replay.headers()["idempotent-replayed"], "true");
            return;
        }
        assert_eq!(replay.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}

/// Taking the names of the standbys away ends all waits; that proves nothing of a standby
/// when the names are there again.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_ends_since_the_names_are_taken_away_proves_nothing() {
    let (primary, standby) = with_standby("names").await;
    let pool = primary.pool().await;
    let service = Service::start(&pool).await;
    standby.stop("immediate").await;
    let first = tokio::spawn(service.charge("order_1").send());
    somebody_waits(&pool).await;
    primary.restart("immediate").await;
    let pool = primary.pool().await;
    eventually("the crash has made the row visible", || async {
        count(&pool, "charges").await == 1
    })
    .await;
    first.await.unwrap().assert_error(503, "unavailable");
    // So that the COMMIT of this replica is the one that waits.
    let replica = service.replica();
    sqlx::query(
        "select pg_terminate_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'",
    )
    .execute(&pool)
    .await
    .unwrap();
    eventually("nobody waits", || async { waiting(&pool).await == 0 }).await;
    let client = replica.clone();
    let replay = tokio::spawn(async move { until_answered(&client, "order_1").await });
    somebody_waits(&pool).await;
    primary.set_standby_names("").await;
    // There is no standby now, so this is as durable as anything.
    assert_eq!(replay.await.unwrap().status, 200);
    primary.set_standby_names("*").await;
    replica
        .charge("order_1")
        .send()
        .await
        .assert_error(503, "unavailable");
}

/// The purge's commits wait for nobody: what it has deleted and lost expires again.
#[tokio::test(flavor = "multi_thread")]
async fn the_purge_leaves_nobody_waiting_for_a_standby() {
    let (primary, standby) = with_standby("purge").await;
    let pool = primary.pool().await;
    let service = Service::start(&pool).await;
    sqlx::query(
        "insert into idempotency_keys (account_id, key, request_hash, operation_id, request_id,
            response_status, response_body, created_at, expires_at)
         select gen_random_uuid(), n::text, decode(repeat('01', 33), 'hex'), gen_random_uuid(),
            gen_random_uuid(), 200, 'null', now(), now() - interval '1 min'
         from generate_series(1, 1500) n",
    )
    .execute(&pool)
    .await
    .unwrap();
    standby.stop("fast").await;
    let purged = purge::run_until_done(&service.app.pool).await.unwrap();
    assert_eq!(purged, 1500);
    assert_eq!(waiting(&pool).await, 0);
}

async fn order(mut tx: Tx) -> StatusCode {
    let done = sqlx::query("insert into orders default values")
        .execute(&mut *tx)
        .await;
    done.map_or(StatusCode::INTERNAL_SERVER_ERROR, |_| StatusCode::CREATED)
}

/// A COMMIT can warn for other reasons, and is a COMMIT all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_warning_of_somebodys_trigger_undoes_nothing() {
    let (primary, _standby) = with_standby("warning").await;
    let pool = primary.pool().await;
    sqlx::raw_sql(
        "create table orders (id serial);
         create function warn() returns trigger language plpgsql as
            $$ begin raise warning 'stock is low'; return null; end $$;
         create constraint trigger warn after insert on orders deferrable initially deferred
            for each row execute function warn();
         create constraint trigger warn after insert on charges deferrable initially deferred
            for each row execute function warn()",
    )
    .execute(&pool)
    .await
    .unwrap();
    let layer = Idempotent::new(pool.clone(), Scenario::Form.default_rule(), |_| {
        Some("ann".to_owned())
    })
    .key_optional();
    let router = Router::new().route("/orders", post(order)).layer(layer);
    for orders in 1..=2 {
        let request = Request::post("/orders").body(Body::empty()).unwrap();
        let reply = router.clone().oneshot(request).await.unwrap();
        assert_eq!(reply.status(), StatusCode::CREATED);
        assert_eq!(count(&pool, "orders").await, orders);
    }
    let reply = Service::start(&pool).await.charge("order_1").send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

/// Known keys are answered while others fill the queue.
#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_standby_leaves_room_for_known_keys() {
    let (primary, standby) = with_standby("room").await;
    let pool = primary.pool().await;
    let settings = Settings {
        queue_max: 8,
        ..Settings::default()
    };
    let service = Service::start_with(&pool, settings).await;
    assert_eq!(service.charge("known").send().await.status, 200);
    assert!(service.charge("known").send().await.is_replayed());
    standby.stop("fast").await;
    let first = tokio::spawn(service.charge("first").send());
    eventually("the service is not ready", || async {
        service.get("/readyz").send().await.status == 503
    })
    .await;
    first.await.unwrap().assert_error(503, "unavailable");
    let [stop, full] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let crowd: Vec<_> = (0..64)
        .map(|i| {
            let service = service.clone();
            let (stop, full) = (Arc::clone(&stop), Arc::clone(&full));
            tokio::spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let reply = service.charge(&format!("order_{i}")).send().await;
                    reply.assert_error(503, "unavailable");
                    if reply.body.contains("Too many requests are waiting") {
                        full.store(true, Ordering::SeqCst);
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            })
        })
        .collect();
    eventually("the queue is full", || async {
        full.load(Ordering::SeqCst)
    })
    .await;
    // The crowd is sent away as it comes; otherwise it keeps all places for 10 s.
    let mut answered = false;
    for _ in 0..100 {
        answered |= service.charge("known").send().await.status == 200;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.store(true, Ordering::SeqCst);
    for one in crowd {
        one.await.unwrap();
    }
    assert!(answered, "no known key got a place");
}
