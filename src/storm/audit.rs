//! The questions afterwards. Through the API, so that they can be put to a
//! deployment whose database one cannot reach; and to the tables as well, if
//! their URL is given.

mod changes;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use serde_json::Value;
use sqlx::{Connection, postgres::PgConnectOptions};
use tokio::{sync::Semaphore, task::JoinSet};

pub use changes::Finding;

use super::{
    Options,
    customers::{Keyed, Shop},
    history::Read,
    ledger::{Answer, KeyId, Operation, Said},
    proxy::{Reply, Routing, Service},
    script::{Fate, Kind},
};
use crate::{
    cli::Failure,
    db::{self, ErrorClass},
};

/// How far the replicas' clocks may be off: lists are in the order of ids, and
/// ids begin with the clock of the replica that gave them out.
const CLOCKS_OFF_SECONDS: i64 = 3 * 60 * 60;

/// What is not as it has to be, by customer, or by key where it may be the key of
/// a change too.
#[derive(Debug, Default)]
pub struct Findings {
    pub charges: usize,
    pub double: BTreeSet<u32>,
    pub lost: BTreeSet<u32>,
    pub differing: BTreeSet<KeyId>,
    pub unanswered: BTreeSet<KeyId>,
    /// Of captures and refunds: the keys, or the charges, that are affected.
    pub changes: BTreeMap<Finding, BTreeSet<String>>,
    /// The customers who did more than pay, and what came of it.
    pub changing: changes::Counts,
    /// How their charges stand.
    pub reads: Vec<Read>,
    /// Whether the questions were put; without them only `differing` is known.
    pub audited: bool,
    /// What the tables say that the API does not.
    pub tables: Option<Vec<String>>,
}

impl Findings {
    /// What the answers alone show.
    pub fn without_audit(shop: &Shop) -> Self {
        let mut differing = BTreeSet::new();
        shop.ledger.for_each(|key, operations| {
            let kind = operations.first().map(|operation| operation.kind);
            if kind.is_some_and(|kind| differ(shop, kind, &distinct(operations))) {
                differing.insert(key);
            }
        });
        Self {
            differing,
            ..Self::default()
        }
    }
}

/// Of the first so many customers, who came.
pub async fn run(
    shop: &Arc<Shop>,
    service: &Arc<Service>,
    options: &Options,
    customers: u32,
    progress: &ProgressBar,
) -> Result<Findings, Failure> {
    let unanswered = ask_every_key_once_more(shop, service, customers, progress).await;
    let charges = read_charges(shop, service).await?;
    let mut findings = Findings {
        unanswered,
        audited: true,
        charges: charges.values().map(Vec::len).sum(),
        ..Findings::default()
    };
    let mut acknowledged = Acknowledged::default();
    for customer in 0..customers {
        let made = charges.get(&customer).map_or(&[][..], Vec::as_slice);
        if made.len() > 1 {
            findings.double.insert(customer);
        }
        let key = KeyId::charge(customer);
        let answers = answers(shop, key);
        if differ(shop, Kind::Charge, &answers) {
            findings.differing.insert(key);
        }
        for (_, answer) in answers {
            // A charge that was told of has to be there.
            let there = answer.charge_id().is_some_and(|id| made.contains(&id));
            if !there {
                findings.lost.insert(customer);
            }
            acknowledged.charges.extend(answer.charge_id());
        }
    }
    changes::audit(shop, service, customers, &mut findings, &mut acknowledged).await?;
    if let Some(url) = &options.database_url {
        findings.tables = Some(read_tables(url, shop, &acknowledged).await?);
    }
    Ok(findings)
}

/// What the service has said that it did, for the tables to confirm.
#[derive(Debug, Default)]
struct Acknowledged {
    charges: Vec<String>,
    /// The charges, and what was captured of them.
    captures: Vec<(String, i64)>,
    refunds: Vec<String>,
}

/// All different answers that were given under a key, each with the cart that it
/// answered.
fn answers(shop: &Shop, key: KeyId) -> Vec<(u8, Answer)> {
    distinct(&shop.ledger.operations(key))
}

fn distinct(operations: &[Operation]) -> Vec<(u8, Answer)> {
    let mut answers = Vec::new();
    for operation in operations {
        if let Said::Answer(answer) = &operation.said {
            let answer = (operation.cart, answer.clone());
            if !answers.contains(&answer) {
                answers.push(answer);
            }
        }
    }
    answers
}

/// Whether they are more than one answer. With expiring answers two refusals, or
/// two states of a charge, may be one.
fn differ(shop: &Shop, kind: Kind, answers: &[(u8, Answer)]) -> bool {
    let mut compared = answers
        .iter()
        .map(|(_, answer)| shop.compared(kind, answer.clone()));
    let first = compared.next();
    compared.any(|other| Some(other) != first)
}

/// Without faults in between. Says which keys have no answer, or one that is not
/// replayed when it is asked for again.
async fn ask_every_key_once_more(
    shop: &Arc<Shop>,
    service: &Arc<Service>,
    customers: u32,
    progress: &ProgressBar,
) -> BTreeSet<KeyId> {
    let door = Arc::new(Semaphore::new(32));
    let mut asking = JoinSet::new();
    for customer in 0..customers {
        let Ok(permit) = Arc::clone(&door).acquire_owned().await else {
            break;
        };
        let (shop, service, progress) = (Arc::clone(shop), Arc::clone(service), progress.clone());
        asking.spawn(async move {
            let changes = shop.begun(customer).map(|begun| begun.changes);
            let mut unanswered = Vec::new();
            // In this order: the last that were begun may not have arrived yet.
            for keyed in [shop.charge(customer)]
                .into_iter()
                .chain(changes.into_iter().flatten())
            {
                if !has_an_answer(&shop, &service, &keyed).await {
                    unanswered.push(keyed.id);
                }
            }
            progress.inc(1);
            drop(permit);
            unanswered
        });
    }
    let mut unanswered = BTreeSet::new();
    while let Some(Ok(keys)) = asking.join_next().await {
        unanswered.extend(keys);
    }
    unanswered
}

async fn has_an_answer(shop: &Shop, service: &Service, keyed: &Keyed) -> bool {
    for cart in [0, 1] {
        // The first question may be the first that arrives at all; the second,
        // at another replica, has to be a replay.
        let Some(first) = ask(shop, service, keyed, cart, 0).await else {
            return false;
        };
        let Said::Answer(answer) = first.said(keyed.kind) else {
            if first.said(keyed.kind) == Said::Reused {
                continue;
            }
            return false;
        };
        let Some(second) = ask(shop, service, keyed, cart, 1).await else {
            return false;
        };
        let Said::Answer(again) = second.said(keyed.kind) else {
            return false;
        };
        // What expired in between may have been decided again.
        let replayed = second.replayed || (shop.answers_expire && keyed.kind != Kind::Charge);
        return replayed && shop.compared(keyed.kind, answer) == shop.compared(keyed.kind, again);
    }
    false
}

async fn ask(
    shop: &Shop,
    service: &Service,
    keyed: &Keyed,
    cart: u8,
    replica: usize,
) -> Option<Reply> {
    let give_up = Instant::now() + shop.patience;
    loop {
        let routing = Routing {
            key: keyed.id,
            kind: keyed.kind,
            cart,
            replica: keyed.id.customer as usize + replica,
            fate: Fate::Passed,
            delay_ms: 0,
        };
        let body = keyed.bodies[usize::from(cart)].clone();
        let reply = service.ask(routing, &keyed.path, &keyed.key, body).await;
        match reply {
            Some(reply) if reply.said(keyed.kind) != Said::Unknown => return Some(reply),
            _ if Instant::now() >= give_up => return None,
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// The ids of all charges of this run's customers, filtered here: a service
/// need not know filters.
async fn read_charges(
    shop: &Shop,
    service: &Service,
) -> Result<BTreeMap<u32, Vec<String>>, Failure> {
    let prefix = shop.customer_id(0).trim_end_matches('0').to_owned();
    let mut charges: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    let mut newest = None;
    let mut after = String::new();
    loop {
        let page = page(
            service,
            &format!("/v1/charges?limit=100{after}"),
            shop.patience,
        )
        .await?;
        let data = page["data"]
            .as_array()
            .ok_or("the list of charges has no data")?;
        let mut last = None;
        for charge in data {
            let id = charge["id"].as_str().ok_or("a charge has no id")?;
            let created = charge["created"].as_i64().ok_or("a charge has no time")?;
            last = Some((id, created));
            let Some(customer) = charge["customer"]
                .as_str()
                .and_then(|name| name.strip_prefix(&prefix))
            else {
                continue;
            };
            let customer = customer
                .parse()
                .map_err(|_| "a charge has a customer that is not ours")?;
            charges.entry(customer).or_default().push(id.to_owned());
        }
        let Some((id, created)) = last else { break };
        let newest = *newest.get_or_insert(created);
        let long_ago = i64::try_from(shop.ledger.now().as_secs()).unwrap_or(0) + CLOCKS_OFF_SECONDS;
        if page["has_more"] != true || created < newest - long_ago {
            break;
        }
        after = format!("&starting_after={id}");
    }
    Ok(charges)
}

async fn page(service: &Service, path: &str, patience: Duration) -> Result<Value, Failure> {
    let give_up = Instant::now() + patience;
    loop {
        match service.get(path).await {
            Some(page) => return Ok(page),
            None if Instant::now() >= give_up => {
                return Err(format!("{path} cannot be read").into());
            }
            None => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// What is wrong in the tables with the keys of this run; rides out a restart.
async fn read_tables(
    url: &str,
    shop: &Shop,
    acknowledged: &Acknowledged,
) -> Result<Vec<String>, Failure> {
    let options = db::connect_options(url)
        .map_err(|error| format!("--database-url cannot be used: {error}"))?;
    let give_up = Instant::now() + shop.patience;
    loop {
        let error = match look_into_tables(&options, &shop.mark, acknowledged).await {
            Ok(findings) => return Ok(findings),
            Err(error) => error,
        };
        if ErrorClass::of(&error) != ErrorClass::Transient || Instant::now() >= give_up {
            return Err(format!(
                "the tables cannot be audited ({}): {}",
                db::server_name(&options),
                db::describe(&error)
            )
            .into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn look_into_tables(
    options: &PgConnectOptions,
    mark: &str,
    acknowledged: &Acknowledged,
) -> Result<Vec<String>, sqlx::Error> {
    let mut conn = db::connect(options).await?;
    let ours = format!("storm-{mark}-%");
    let found = sqlx::query!(
        r#"
        with keys as (
            select * from idempotency_keys
            where key like $1 and key !~ '-(capture|refund)-[0-9]+$'
        ), made as (
            select * from charges where idempotency_key like $1
        )
        select 'more than one charge for the key ' || idempotency_key as "finding!"
        from made group by account_id, idempotency_key having count(*) > 1
        union all
        select 'an answer without its charge under the key ' || keys.key
        from keys
        left join made on made.account_id = keys.account_id and made.idempotency_key = keys.key
        where keys.response_status is not null and made.charge_id is null
        union all
        select 'an answer that is not its charge''s under the key ' || keys.key
        from keys
        join made on made.account_id = keys.account_id and made.idempotency_key = keys.key
        where keys.operation_id <> made.charge_id
            or keys.request_hash <> made.request_hash
            or case keys.response_status
                when 200 then
                    row (keys.response_body ->> 'id', keys.response_body ->> 'amount',
                        keys.response_body ->> 'currency', keys.response_body ->> 'customer',
                        keys.response_body ->> 'status')
                    is distinct from
                    row ('ch_' || replace(made.charge_id::text, '-', ''), made.amount::text,
                        made.currency, made.customer, made.status)
                when 402 then
                    row (keys.response_body -> 'error' ->> 'charge', keys.response_body -> 'error' ->> 'code',
                        keys.response_body -> 'error' ->> 'decline_code', 'failed')
                    is distinct from
                    row ('ch_' || replace(made.charge_id::text, '-', ''), made.failure_code,
                        made.decline_code, made.status)
                else keys.response_status is not null
            end
        union all
        select 'a charge is pending under the key ' || idempotency_key from made where status = 'pending'
        union all
        select 'a lock without an owner on the key ' || key
        from idempotency_keys where key like $1 and response_status is null
        union all
        select 'an acknowledged charge is not there: ' || told.id
        from unnest($2::text[]) as told (id)
        left join made on 'ch_' || replace(made.charge_id::text, '-', '') = told.id
        where made.charge_id is null
        "#,
        ours,
        &acknowledged.charges
    )
    .fetch_all(&mut conn)
    .await?;
    let mut found: Vec<_> = found.into_iter().map(|row| row.finding).collect();
    found.extend(changes::look_into_tables(&mut conn, &ours, acknowledged).await?);
    conn.close().await?;
    Ok(found)
}
