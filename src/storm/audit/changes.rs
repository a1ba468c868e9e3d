//! What became of captures and refunds. Each charge that was changed is read, with
//! its refunds, when all keys have their answers, and held against them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value;
use sqlx::PgConnection;
use tokio::{sync::Semaphore, task::JoinSet};

use super::{Acknowledged, Findings, answers, differ, page};
use crate::{
    cli::Failure,
    storm::{
        customers::{Begun, Keyed, Shop},
        history::Read,
        ledger::Answer,
        proxy::Service,
        script::Kind,
    },
};

/// What may be wrong with captures and refunds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finding {
    /// More than one capture of a charge was acknowledged.
    DoubleCaptures,
    /// More was captured than the charge's amount, or than was asked for.
    CapturesBeyondAmount,
    /// Less was captured than was acknowledged.
    LostCaptures,
    /// A key has two refunds, or a charge one that nobody asked for.
    DoubleRefunds,
    /// More was refunded than was captured.
    RefundsBeyondCaptured,
    /// An acknowledged refund is not there, or is another one.
    LostRefunds,
    /// The refunds of a charge are not `amount_refunded`, or not as asked for.
    RefundsNotAddingUp,
    /// A change was refused although it was possible, or although it was done.
    WrongRefusals,
}

impl Finding {
    /// All of them, in the order in which they are reported.
    pub const ALL: [Self; 8] = [
        Self::DoubleCaptures,
        Self::CapturesBeyondAmount,
        Self::LostCaptures,
        Self::DoubleRefunds,
        Self::RefundsBeyondCaptured,
        Self::LostRefunds,
        Self::RefundsNotAddingUp,
        Self::WrongRefusals,
    ];

    /// As it stands in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::DoubleCaptures => "double_captures",
            Self::CapturesBeyondAmount => "captures_beyond_amount",
            Self::LostCaptures => "lost_captures",
            Self::DoubleRefunds => "double_refunds",
            Self::RefundsBeyondCaptured => "refunds_beyond_captured",
            Self::LostRefunds => "lost_refunds",
            Self::RefundsNotAddingUp => "refunds_not_adding_up",
            Self::WrongRefusals => "wrong_refusals",
        }
    }
}

/// Of the customers who did more than pay.
#[derive(Debug, Default)]
pub struct Counts {
    pub customers: usize,
    /// Changes that were done.
    pub captures: usize,
    pub refunds: usize,
    /// Changes that the charge did not allow.
    pub refused: usize,
}

pub(super) async fn audit(
    shop: &Arc<Shop>,
    service: &Arc<Service>,
    customers: u32,
    findings: &mut Findings,
    acknowledged: &mut Acknowledged,
) -> Result<(), Failure> {
    for (customer, begun, charge) in read_charges(shop, service, customers).await? {
        let outcomes: Vec<_> = begun
            .changes
            .iter()
            .map(|keyed| Outcome::of(keyed, answers(shop, keyed.id)))
            .collect();
        for outcome in &outcomes {
            if differ(shop, outcome.keyed.kind, &outcome.answers) {
                findings.differing.insert(outcome.keyed.id);
            }
        }
        findings.count(&begun, &outcomes, acknowledged);
        let Some(charge) = charge else {
            findings.lost.insert(customer);
            continue;
        };
        findings.reads.push(charge.read(customer, &begun));
        let mut judge = Judge {
            begun: &begun,
            outcomes: &outcomes,
            charge: &charge,
            answers_expire: shop.answers_expire,
            findings: &mut findings.changes,
        };
        judge.captures();
        judge.refunds();
    }
    Ok(())
}

impl Findings {
    fn count(&mut self, begun: &Begun, outcomes: &[Outcome<'_>], acknowledged: &mut Acknowledged) {
        self.changing.customers += 1;
        for outcome in outcomes {
            let done = outcome.done.iter().map(|(_, object)| object);
            let there = usize::from(!outcome.done.is_empty());
            self.changing.refused += usize::from(there == 0 && !outcome.refused.is_empty());
            if outcome.keyed.kind == Kind::Refund {
                self.changing.refunds += there;
                let ids = done.filter_map(|refund| refund["id"].as_str());
                acknowledged.refunds.extend(ids.map(str::to_owned));
            } else {
                self.changing.captures += there;
                let amounts = done.filter_map(|charge| charge["amount_captured"].as_i64());
                let captures = amounts.map(|amount| (begun.charge_id.clone(), amount));
                acknowledged.captures.extend(captures);
            }
        }
    }
}

/// What was said to one key.
struct Outcome<'a> {
    keyed: &'a Keyed,
    answers: Vec<(u8, Answer)>,
    /// The amounts that were asked for, and the captures or refunds that were
    /// acknowledged: one, unless the answers differ.
    done: Vec<(Option<i64>, Value)>,
    /// The amounts that were refused.
    refused: Vec<Option<i64>>,
}

impl<'a> Outcome<'a> {
    fn of(keyed: &'a Keyed, answers: Vec<(u8, Answer)>) -> Self {
        let (mut done, mut refused) = (Vec::new(), Vec::new());
        for (cart, answer) in &answers {
            let asked = keyed.amounts[usize::from(*cart)];
            if answer.status == 200 {
                done.push((
                    asked,
                    serde_json::from_str(&answer.body).unwrap_or_default(),
                ));
            } else {
                refused.push(asked);
            }
        }
        Self {
            keyed,
            answers,
            done,
            refused,
        }
    }
}

/// A charge that was changed, as it stands in the end.
struct Charge {
    called: std::time::Duration,
    returned: std::time::Duration,
    amount: i64,
    captured: i64,
    refunded: i64,
    says_captured: bool,
    says_refunded: bool,
    refunds: Vec<Value>,
}

impl Charge {
    fn read(&self, customer: u32, begun: &Begun) -> Read {
        Read {
            customer,
            called: self.called,
            returned: self.returned,
            authorised: begun.authorised,
            amount: self.amount,
            captured: self.captured,
            refunded: self.refunded,
        }
    }

    /// What can be refunded in all. Of a charge that is not captured a refund
    /// cancels the whole.
    fn refundable(&self) -> i64 {
        if self.captured == 0 {
            self.amount
        } else {
            self.captured
        }
    }
}

/// The charges of the first so many customers, those that did more than pay;
/// `None` for one that is not there.
async fn read_charges(
    shop: &Arc<Shop>,
    service: &Arc<Service>,
    customers: u32,
) -> Result<Vec<(u32, Begun, Option<Charge>)>, Failure> {
    let door = Arc::new(Semaphore::new(32));
    let mut reading = JoinSet::new();
    for customer in 0..customers {
        let Some(begun) = shop.begun(customer) else {
            continue;
        };
        let Ok(permit) = Arc::clone(&door).acquire_owned().await else {
            break;
        };
        let (shop, service) = (Arc::clone(shop), Arc::clone(service));
        reading.spawn(async move {
            let charge = read_charge(&shop, &service, &begun.charge_id).await;
            drop(permit);
            charge.map(|charge| (customer, begun, charge))
        });
    }
    let mut charges = Vec::new();
    while let Some(read) = reading.join_next().await {
        charges.push(read.map_err(|_| "reading a charge ended early")??);
    }
    Ok(charges)
}

async fn read_charge(shop: &Shop, service: &Service, id: &str) -> Result<Option<Charge>, Failure> {
    let called = shop.ledger.now();
    let charge = page(service, &format!("/v1/charges/{id}"), shop.patience).await?;
    let returned = shop.ledger.now();
    if charge.is_null() {
        return Ok(None);
    }
    let number = |name: &str| {
        charge[name]
            .as_i64()
            .ok_or_else(|| format!("the charge {id} has no {name}"))
    };
    Ok(Some(Charge {
        called,
        returned,
        amount: number("amount")?,
        captured: number("amount_captured")?,
        refunded: number("amount_refunded")?,
        says_captured: charge["captured"] == true,
        says_refunded: charge["refunded"] == true,
        refunds: read_refunds(shop, service, id).await?,
    }))
}

async fn read_refunds(shop: &Shop, service: &Service, id: &str) -> Result<Vec<Value>, Failure> {
    let mut refunds: Vec<Value> = Vec::new();
    let mut after = String::new();
    loop {
        let path = format!("/v1/refunds?charge={id}&limit=100{after}");
        let page = page(service, &path, shop.patience).await?;
        let data = page["data"]
            .as_array()
            .ok_or("the list of refunds has no data")?;
        refunds.extend(data.iter().cloned());
        match data.last().map(|refund| refund["id"].as_str()) {
            Some(Some(last)) if page["has_more"] == true => {
                after = format!("&starting_after={last}");
            }
            Some(None) => return Err("a refund has no id".into()),
            _ => return Ok(refunds),
        }
    }
}

/// Holds one charge against what was said of it.
struct Judge<'a> {
    begun: &'a Begun,
    outcomes: &'a [Outcome<'a>],
    charge: &'a Charge,
    answers_expire: bool,
    findings: &'a mut BTreeMap<Finding, BTreeSet<String>>,
}

impl<'a> Judge<'a> {
    fn found(&mut self, finding: Finding, name: &str) {
        self.findings
            .entry(finding)
            .or_default()
            .insert(name.to_owned());
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &'a Outcome<'a>> + use<'a> {
        let outcomes = self.outcomes;
        outcomes
            .iter()
            .filter(move |outcome| outcome.keyed.kind == kind)
    }

    fn captures(&mut self) {
        let Charge {
            amount,
            captured,
            refunded,
            says_captured,
            ..
        } = *self.charge;
        let whole = self.begun.amount;
        let done: Vec<_> = self
            .of_kind(Kind::Capture)
            .filter(|outcome| !outcome.done.is_empty())
            .collect();
        if done.len() > 1 {
            for outcome in &done {
                self.found(Finding::DoubleCaptures, &outcome.keyed.key);
            }
        }
        // What may have been captured, each by one that asked for it.
        let mut asked: Vec<(&str, i64)> = done
            .iter()
            .flat_map(|outcome| {
                let amounts = outcome.done.iter();
                amounts.map(|(asked, _)| (outcome.keyed.key.as_str(), asked.unwrap_or(whole)))
            })
            .collect();
        if !self.begun.authorised {
            asked.push((&self.begun.charge_id, whole));
        }
        if self.answers_expire && asked.is_empty() {
            // The answer has expired before anybody saw it, and a capture is
            // refused after the capture that it is.
            let refused = self.of_kind(Kind::Capture);
            let amounts = refused.flat_map(|outcome| {
                let amounts = outcome.refused.iter();
                amounts.map(|amount| (outcome.keyed.key.as_str(), amount.unwrap_or(whole)))
            });
            asked.extend(amounts.filter(|&(_, amount)| amount == captured));
        }
        for outcome in &done {
            let key = &outcome.keyed.key;
            for (asked, charge) in &outcome.done {
                let asked = asked.unwrap_or(whole);
                match charge["amount_captured"].as_i64() {
                    Some(said) if said > asked || said > whole => {
                        self.found(Finding::CapturesBeyondAmount, key);
                    }
                    Some(said) if said == asked => {}
                    _ => self.found(Finding::LostCaptures, key),
                }
            }
        }
        let charge_id = &self.begun.charge_id;
        let most = asked.iter().map(|&(_, amount)| amount).max();
        if captured > amount || most.is_some_and(|most| captured > most) {
            self.found(Finding::CapturesBeyondAmount, charge_id);
        } else if most.is_none() && captured > 0 && self.all_answered(Kind::Capture) {
            // Every capture was refused, and yet there was one.
            self.found(Finding::WrongRefusals, charge_id);
        }
        let least = asked.iter().min_by_key(|&&(_, amount)| amount);
        if let Some(&(key, least)) = least
            && (captured < least || amount != whole || !says_captured)
        {
            self.found(Finding::LostCaptures, key);
        }
        for outcome in self.of_kind(Kind::Capture) {
            for amount in &outcome.refused {
                let possible = captured == 0 && refunded == 0 && amount.unwrap_or(whole) <= whole;
                let own = !outcome.done.is_empty() && !self.answers_expire;
                if possible || own {
                    self.found(Finding::WrongRefusals, &outcome.keyed.key);
                }
            }
        }
    }

    fn refunds(&mut self) {
        let charge = self.charge;
        let charge_id = &self.begun.charge_id;
        let mut by_key: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
        for refund in &charge.refunds {
            let key = refund["metadata"]["storm_key"].as_str().unwrap_or_default();
            by_key.entry(key).or_default().push(refund);
        }
        let sum: i64 = charge
            .refunds
            .iter()
            .filter_map(|refund| refund["amount"].as_i64())
            .sum();
        let refundable = charge.refundable();
        // It only becomes less, so this much was left all the time.
        let left = refundable - sum.max(charge.refunded);
        for outcome in self.of_kind(Kind::Refund) {
            let key = &outcome.keyed.key;
            let there = by_key.remove(key.as_str()).unwrap_or_default();
            if there.len() > 1 {
                self.found(Finding::DoubleRefunds, key);
            }
            for (asked, refund) in &outcome.done {
                if !there.iter().any(|there| is_same_refund(there, refund)) {
                    self.found(Finding::LostRefunds, key);
                }
                if asked.is_some() && refund["amount"].as_i64() != *asked {
                    self.found(Finding::RefundsNotAddingUp, key);
                }
            }
            for amount in &outcome.refused {
                if !there.is_empty() || amount.unwrap_or(1) <= left {
                    self.found(Finding::WrongRefusals, key);
                }
            }
        }
        // Under a key that nobody has.
        if !by_key.is_empty() {
            self.found(Finding::DoubleRefunds, charge_id);
        }
        if sum > refundable || charge.refunded > refundable {
            self.found(Finding::RefundsBeyondCaptured, charge_id);
        }
        let all = charge.refunded > 0 && charge.refunded == refundable;
        if charge.refunded != sum || charge.says_refunded != all {
            self.found(Finding::RefundsNotAddingUp, charge_id);
        }
    }

    fn all_answered(&self, kind: Kind) -> bool {
        self.of_kind(kind)
            .all(|outcome| !outcome.answers.is_empty())
    }
}

/// Bytes that differ are another finding, of the answers.
fn is_same_refund(one: &Value, other: &Value) -> bool {
    ["id", "charge", "amount", "currency", "status"]
        .into_iter()
        .all(|name| one[name] == other[name])
}

/// What is wrong in the tables with the captures and refunds of this run, whose
/// keys are like `ours`.
pub(super) async fn look_into_tables(
    conn: &mut PgConnection,
    ours: &str,
    acknowledged: &Acknowledged,
) -> Result<Vec<String>, sqlx::Error> {
    let (captured, amounts): (Vec<String>, Vec<i64>) =
        acknowledged.captures.iter().cloned().unzip();
    let found = sqlx::query!(
        r#"
        with keys as (
            select * from idempotency_keys where key like $1
        ), captures as (
            select account_id, key, response_body ->> 'id' as id,
                response_body ->> 'amount_captured' as amount_captured
            from keys where key ~ '-capture-[0-9]+$' and response_status = 200
        ), made as (
            select *, 'ch_' || replace(charge_id::text, '-', '') as id
            from charges where idempotency_key like $1
        ), given as (
            select *, 're_' || replace(refund_id::text, '-', '') as id
            from refunds where idempotency_key like $1
        )
        select 'more than one refund for the key ' || idempotency_key as "finding!"
        from given group by account_id, idempotency_key having count(*) > 1
        union all
        select 'an answer without its refund under the key ' || keys.key
        from keys
        left join given on given.account_id = keys.account_id and given.idempotency_key = keys.key
        where keys.key ~ '-refund-[0-9]+$' and keys.response_status = 200 and given.refund_id is null
        union all
        select 'a refusal of what was refunded under the key ' || keys.key
        from keys
        join given on given.account_id = keys.account_id and given.idempotency_key = keys.key
        where keys.response_status <> 200
        union all
        select 'an answer that is not its refund''s under the key ' || keys.key
        from keys
        join given on given.account_id = keys.account_id and given.idempotency_key = keys.key
        where keys.response_status = 200 and (
            keys.operation_id <> given.refund_id
            or keys.request_hash <> given.request_hash
            or row (keys.response_body ->> 'id', keys.response_body ->> 'amount',
                    keys.response_body ->> 'currency', keys.response_body ->> 'charge')
                is distinct from
                row (given.id, given.amount::text, given.currency,
                    'ch_' || replace(given.charge_id::text, '-', ''))
        )
        union all
        select 'the refunds are not the amount refunded of the charge ' || made.id
        from made
        left join refunds using (account_id, charge_id)
        group by made.account_id, made.id, made.amount_refunded
        having coalesce(sum(refunds.amount), 0) <> made.amount_refunded
        union all
        select 'more is refunded than captured of the charge ' || id
        from made
        where amount_refunded > case when amount_captured = 0 then amount else amount_captured end
        union all
        select 'more is captured than the amount of the charge ' || id
        from made where amount_captured > amount
        union all
        select 'not captured as asked for: the charge ' || id
        from made where capture and status = 'succeeded' and amount_captured <> amount
        union all
        select 'more than one capture of the charge ' || id
        from captures group by account_id, id having count(*) > 1
        union all
        select 'an answer that is not its charge''s under the key ' || captures.key
        from captures
        left join made on made.account_id = captures.account_id and made.id = captures.id
        where made.amount_captured::text is distinct from captures.amount_captured
        union all
        select 'an acknowledged capture is not in the charge ' || told.id
        from unnest($2::text[], $3::int8[]) as told (id, amount_captured)
        left join made on made.id = told.id
        where made.amount_captured is distinct from told.amount_captured
        union all
        select 'an acknowledged refund is not there: ' || told.id
        from unnest($4::text[]) as told (id)
        left join given on given.id = told.id
        where given.refund_id is null
        "#,
        ours,
        &captured,
        &amounts,
        &acknowledged.refunds,
    )
    .fetch_all(conn)
    .await?;
    Ok(found.into_iter().map(|row| row.finding).collect())
}
