//! Promise 2: what was acknowledged is durable. And what was not acknowledged
//! is found again or made, once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use crate::support::{
    Reply, Service, count, eventually, make_account, persistently,
    postgres::Cluster,
    process::{HttpClient, Process, Signal},
    proxy::{Network, Proxy},
    url,
};

/// Every acknowledged charge is there, under its id, and no key has two.
async fn assert_all_there(pool: &PgPool, acknowledged: &BTreeMap<String, Reply>) {
    for (key, reply) in acknowledged {
        let ids: Vec<String> = sqlx::query_scalar(
            "select 'ch_' || replace(charge_id::text, '-', '') from charges where idempotency_key = $1",
        )
        .bind(key)
        .fetch_all(pool)
        .await
        .unwrap();
        assert_eq!(ids, [reply.charge_id()], "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_restarts_under_load_and_no_request_notices() {
    let cluster = Cluster::start("test-restart").await;
    let pool = cluster.pool().await;
    let service = Service::start(&pool).await;
    let done = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..16)
        .map(|client| {
            let (service, done) = (service.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                let mut acknowledged = BTreeMap::new();
                for i in 0.. {
                    if done.load(Ordering::SeqCst) {
                        break;
                    }
                    // Its callers are not remembered, so that finding out who
                    // asks has to ride it out too.
                    let cold = service.with_cold_callers();
                    let key = format!("order_{client}_{i}");
                    let (reply, asked) = persistently(|| cold.charge(&key)).await;
                    assert_eq!(reply.status, 200, "{reply:?}");
                    assert!(
                        asked > 1 || !reply.is_replayed(),
                        "a first answer was called a replay: {key}"
                    );
                    let path = format!("/v1/charges/{}", reply.charge_id());
                    let (read, _) = persistently(|| cold.get(&path)).await;
                    assert_eq!(read.body, reply.body);
                    acknowledged.insert(key, reply);
                }
                acknowledged
            })
        })
        .collect();

    for mode in ["fast", "immediate", "immediate", "fast"] {
        // Only a server that is under load proves something by its restart.
        let before = count(&pool, "charges").await;
        let under_load = || async { count(&pool, "charges").await > before + 50 };
        eventually("charges are made between two restarts", under_load).await;
        cluster.restart(mode).await;
    }
    done.store(true, Ordering::SeqCst);
    let pool = cluster.pool().await;
    let mut acknowledged = BTreeMap::new();
    for client in join_all(clients).await {
        acknowledged.extend(client.unwrap());
    }
    assert_all_there(&pool, &acknowledged).await;
    assert_eq!(
        count(&pool, "charges").await,
        i64::try_from(acknowledged.len()).unwrap()
    );
}

async fn a_lost_commit_is_found_again(pool: PgPool, committed: bool) {
    let proxy = Proxy::to(&pool).await;
    let service = Service::start(&pool).await.behind(&proxy);
    for round in 0..10 {
        proxy.lose_commits(1 + round % 2, committed);
        let replies =
            join_all((0..8).map(|i| service.charge(&format!("order_{round}_{i}")).send())).await;
        for (i, reply) in replies.iter().enumerate() {
            assert_eq!(reply.status, 200, "{reply:?}");
            assert!(!reply.is_replayed(), "it is the first answer, found again");
            let replay = service.charge(&format!("order_{round}_{i}")).send().await;
            assert_eq!(replay.body, reply.body);
        }
        assert_eq!(
            proxy.commits_to_lose(),
            0,
            "no COMMIT was lost, so nothing was tested"
        );
    }
    assert_eq!(service.count_charges().await, 80);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_commit_whose_acknowledgement_is_lost_is_found_again(pool: PgPool) {
    a_lost_commit_is_found_again(pool, true).await;
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_commit_that_is_under_way_when_the_connection_goes_is_found_again(pool: PgPool) {
    a_lost_commit_is_found_again(pool, false).await;
}

/// Nothing arrives, and nobody is told so: the attempt's own time-out ends it,
/// and the next one, over a new connection, meets a network that is well again.
#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_network_that_falls_silent_or_slow_is_ridden_out(pool: PgPool) {
    let proxy = Proxy::to(&pool).await;
    let service = Service::start(&pool).await.behind(&proxy);
    for (round, bad) in [Network::Silent, Network::Slow(Duration::from_millis(50))]
        .into_iter()
        .enumerate()
    {
        assert_eq!(
            service
                .charge(&format!("before_{round}"))
                .send()
                .await
                .status,
            200
        );
        proxy.set(bad);
        let requests: Vec<_> = (0..16)
            .map(|i| tokio::spawn(service.charge(&format!("order_{round}_{i}")).send()))
            .collect();
        // The time itself is the fault.
        tokio::time::sleep(Duration::from_secs(3)).await;
        proxy.set(Network::Well);
        for request in requests {
            let reply = request.await.unwrap();
            assert_eq!(reply.status, 200, "{reply:?}");
            assert!(!reply.is_replayed());
        }
    }
    assert_eq!(service.count_charges().await, 34);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn kill_9_under_load_loses_nothing_and_doubles_nothing(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let mut acknowledged = BTreeMap::new();
    let mut unknown = Vec::new();
    for round in 0..3 {
        let mut process = Process::serve(&url(&pool)).await;
        let address = process.address.clone();
        let made = Arc::new(AtomicUsize::new(0));
        let clients: Vec<_> = (0..16)
            .map(|client| {
                let (http, address, made) = (
                    HttpClient::new(&api_key),
                    address.clone(),
                    Arc::clone(&made),
                );
                tokio::spawn(async move {
                    let mut acknowledged = Vec::new();
                    for i in 0.. {
                        let key = format!("order_{round}_{client}_{i}");
                        match http.charge(&address, &key).await {
                            Ok(reply) => acknowledged.push((key, reply)),
                            Err(_) => return (acknowledged, key),
                        }
                        made.fetch_add(1, Ordering::SeqCst);
                    }
                    unreachable!("the service is killed")
                })
            })
            .collect();
        let under_load = || async { made.load(Ordering::SeqCst) > 200 };
        eventually("the service is under load", under_load).await;
        process.kill().await;
        for client in join_all(clients).await {
            let (done, last) = client.unwrap();
            acknowledged.extend(done);
            unknown.push(last);
        }
        assert_all_there(&pool, &acknowledged).await;
    }
    let restarted = Process::serve(&url(&pool)).await;
    let http = HttpClient::new(&api_key);
    for key in unknown {
        let reply = http.charge(&restarted.address, &key).await.unwrap();
        assert_eq!(
            http.charge(&restarted.address, &key).await.unwrap().body,
            reply.body
        );
        acknowledged.insert(key, reply);
    }
    for (key, first) in acknowledged.iter().take(200) {
        let replay = http.charge(&restarted.address, key).await.unwrap();
        assert_eq!(replay.body, first.body);
        assert!(replay.is_replayed());
    }
    assert_all_there(&pool, &acknowledged).await;
    assert_eq!(
        count(&pool, "charges").await,
        i64::try_from(acknowledged.len()).unwrap()
    );
}

/// Writes one request, as a client does that keeps its connection.
async fn write_request(stream: &mut TcpStream, api_key: &str, key: &str) {
    let body = r#"{"amount":5000,"currency":"usd"}"#;
    let request = format!(
        "POST /v1/charges HTTP/1.1\r\nhost: payonce\r\nauthorization: Bearer {api_key}\r\n\
         idempotency-key: {key}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn what_has_arrived_when_sigterm_comes_is_answered(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    for round in 0..5 {
        let process = Process::serve(&url(&pool)).await;
        let address = process.address.clone();
        // One connection that was used already, and one that nobody has taken.
        let mut used = TcpStream::connect(&address).await.unwrap();
        write_request(&mut used, &api_key, &format!("order_{round}_0")).await;
        let mut answer = [0; 4096];
        let length = used.read(&mut answer).await.unwrap();
        assert!(answer[..length].starts_with(b"HTTP/1.1 200"));
        // It stands still until requests and signal are there.
        process.signal(Signal::STOP);
        let mut new = TcpStream::connect(&address).await.unwrap();
        write_request(&mut used, &api_key, &format!("order_{round}_1")).await;
        write_request(&mut new, &api_key, &format!("order_{round}_2")).await;
        process.signal(Signal::TERM);
        process.signal(Signal::CONT);
        for mut stream in [used, new] {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
            assert!(answer.contains("connection: close"), "{answer:?}");
        }
        assert!(process.ended().await.success());
    }
    assert_eq!(count(&pool, "charges").await, 15);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn sigterm_finishes_what_was_taken(pool: PgPool) {
    let (_, api_key) = make_account(&pool).await;
    let process = Process::serve(&url(&pool)).await;
    // Eight requests in the middle of their work when the signal comes.
    let blocker = pool
        .begin_with("begin; lock table charges in share mode")
        .await
        .unwrap();
    let requests: Vec<_> = (0..8)
        .map(|i| {
            let (http, address) = (HttpClient::new(&api_key), process.address.clone());
            tokio::spawn(async move { http.charge(&address, &format!("order_{i}")).await })
        })
        .collect();
    crate::support::somebody_is_blocked(&pool).await;
    let address = process.address.clone();
    let ended = tokio::spawn(process.terminate());
    let refuses = || async { tokio::net::TcpStream::connect(&address).await.is_err() };
    eventually("it takes no connection any more", refuses).await;
    blocker.rollback().await.unwrap();

    for request in requests {
        let reply = request.await.unwrap().unwrap();
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let ended = ended.await.unwrap();
    assert!(ended.success(), "{ended:?}");
    assert_eq!(count(&pool, "charges").await, 8);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn sigterm_does_not_wait_for_clients_that_do_not_go_on(pool: PgPool) {
    let process = Process::serve(&url(&pool)).await;
    let mut answer = [0; 32];
    // One whose first head is not finished, one whose second is not, and one that
    // asks and asks and does not read.
    let mut first = TcpStream::connect(&process.address).await.unwrap();
    first.write_all(b"GET /healthz HTT").await.unwrap();
    let mut second = TcpStream::connect(&process.address).await.unwrap();
    let request = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET";
    second.write_all(request).await.unwrap();
    second.read_exact(&mut answer).await.unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address = process.address.parse().unwrap();
    let mut deaf = socket.connect(address).await.unwrap();
    let request = "GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n";
    deaf.write_all(request.repeat(500).as_bytes())
        .await
        .unwrap();
    deaf.read_exact(&mut answer).await.unwrap();
    // It ends with an error where it is stopped by its deadline, of 15 s.
    assert!(process.terminate().await.success());
}
