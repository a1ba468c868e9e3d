//! The questions afterwards. Through the API, so that they can be put to a
//! deployment whose database one cannot reach; and to the tables as well, if
//! their URL is given.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use serde_json::Value;
use sqlx::{Connection, postgres::PgConnectOptions};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    Options,
    customers::Shop,
    ledger::{Answer, Said},
    proxy::{Reply, Routing, Service},
    script::Fate,
};
use crate::{
    cli::Failure,
    db::{self, Trouble},
};

/// How far the replicas' clocks may be off: lists are in the order of ids, and
/// ids begin with the clock of the replica that gave them out.
const CLOCKS_OFF_SECONDS: i64 = 3 * 60 * 60;

/// What is not as it has to be, by customer.
#[derive(Debug, Default)]
pub struct Findings {
    pub charges: usize,
    pub double: BTreeSet<u32>,
    pub lost: BTreeSet<u32>,
    pub differing: BTreeSet<u32>,
    pub unanswered: BTreeSet<u32>,
    /// Whether the questions were put; without them only `differing` is known.
    pub audited: bool,
    /// What the tables say that the API does not.
    pub tables: Option<Vec<String>>,
}

impl Findings {
    /// What the answers alone show.
    pub fn without_audit(shop: &Shop, customers: u32) -> Self {
        Self {
            differing: (0..customers)
                .filter(|&customer| answers(shop, customer).len() > 1)
                .collect(),
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
    for customer in 0..customers {
        let made = charges.get(&customer).map_or(&[][..], Vec::as_slice);
        if made.len() > 1 {
            findings.double.insert(customer);
        }
        let answers = answers(shop, customer);
        if answers.len() > 1 {
            findings.differing.insert(customer);
        }
        for answer in answers {
            // A charge that was told of has to be there.
            let there = answer.charge_id().is_some_and(|id| made.contains(&id));
            if !there {
                findings.lost.insert(customer);
            }
        }
    }
    if let Some(url) = &options.database_url {
        findings.tables = Some(read_tables(url, shop).await?);
    }
    Ok(findings)
}

/// All different answers that were given under a customer's key.
fn answers(shop: &Shop, customer: u32) -> Vec<Answer> {
    let mut answers = Vec::new();
    for operation in shop.ledger.operations(customer) {
        if let Said::Answer(answer) = operation.said
            && !answers.contains(&answer)
        {
            answers.push(answer);
        }
    }
    answers
}

/// Without faults in between. Says whose keys have no answer, or one that is
/// not replayed when it is asked for again.
async fn ask_every_key_once_more(
    shop: &Arc<Shop>,
    service: &Arc<Service>,
    customers: u32,
    progress: &ProgressBar,
) -> BTreeSet<u32> {
    let door = Arc::new(Semaphore::new(32));
    let mut asking = JoinSet::new();
    for customer in 0..customers {
        let Ok(permit) = Arc::clone(&door).acquire_owned().await else {
            break;
        };
        let (shop, service, progress) = (Arc::clone(shop), Arc::clone(service), progress.clone());
        asking.spawn(async move {
            let answered = has_an_answer(&shop, &service, customer).await;
            progress.inc(1);
            drop(permit);
            (customer, answered)
        });
    }
    let mut unanswered = BTreeSet::new();
    while let Some(Ok((customer, answered))) = asking.join_next().await {
        if !answered {
            unanswered.insert(customer);
        }
    }
    unanswered
}

async fn has_an_answer(shop: &Shop, service: &Service, customer: u32) -> bool {
    for cart in [0, 1] {
        // The first question may be the first that arrives at all; the second,
        // at another replica, has to be a replay.
        let Some(first) = ask(shop, service, customer, cart, 0).await else {
            return false;
        };
        if first.said() == Said::Reused {
            continue;
        }
        let Some(second) = ask(shop, service, customer, cart, 1).await else {
            return false;
        };
        return matches!(first.said(), Said::Answer(_))
            && first.said() == second.said()
            && second.replayed;
    }
    false
}

async fn ask(
    shop: &Shop,
    service: &Service,
    customer: u32,
    cart: u8,
    replica: usize,
) -> Option<Reply> {
    let give_up = Instant::now() + shop.patience;
    loop {
        let routing = Routing {
            customer,
            cart,
            replica: customer as usize + replica,
            fate: Fate::Passed,
            delay_ms: 0,
        };
        let reply = service
            .charge(routing, &shop.key(customer), shop.body(customer, cart))
            .await;
        match reply {
            Some(reply) if reply.said() != Said::Unknown => return Some(reply),
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
            None if Instant::now() >= give_up => return Err("the charges cannot be listed".into()),
            None => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// What is wrong in the tables with the keys of this run; rides out a restart.
async fn read_tables(url: &str, shop: &Shop) -> Result<Vec<String>, Failure> {
    let options = db::connect_options(url)
        .map_err(|error| format!("--database-url cannot be used: {error}"))?;
    let give_up = Instant::now() + shop.patience;
    loop {
        let error = match look_into_tables(&options, &shop.mark).await {
            Ok(findings) => return Ok(findings),
            Err(error) => error,
        };
        if Trouble::of(&error) != Trouble::Passing || Instant::now() >= give_up {
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
) -> Result<Vec<String>, sqlx::Error> {
    let mut conn = db::connect(options).await?;
    let ours = format!("storm-{mark}-%");
    let found = sqlx::query!(
        r#"
        with keys as (
            select * from idempotency_keys where key like $1
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
        select 'a lock without an owner on the key ' || key from keys where response_status is null
        "#,
        ours
    )
    .fetch_all(&mut conn)
    .await?;
    conn.close().await?;
    Ok(found.into_iter().map(|row| row.finding).collect())
}
