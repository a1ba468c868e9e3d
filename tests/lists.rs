//! Reading charges: one by its id, all of them page by page.

use serde_json::Value;
use sqlx::PgPool;

use crate::support::Service;

fn ids(list: &Value) -> Vec<String> {
    list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|charge| charge["id"].as_str().unwrap().to_owned())
        .collect()
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn charges_are_listed_newest_first_page_by_page(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut made = Vec::new();
    for i in 0..25 {
        made.push(
            service
                .charge(&format!("order_{i}"))
                .send()
                .await
                .charge_id(),
        );
    }
    made.reverse();

    let by_default = service.get("/v1/charges").send().await.value();
    assert_eq!(ids(&by_default), made[..10]);
    assert_eq!(by_default["object"], "list");
    assert_eq!(by_default["url"], "/v1/charges");
    assert_eq!(by_default["has_more"], true);

    let mut paged = Vec::new();
    let mut path = "/v1/charges?limit=7".to_owned();
    loop {
        let page = service.get(&path).send().await.value();
        let new = ids(&page);
        assert!(new.len() <= 7);
        path = format!("/v1/charges?limit=7&starting_after={}", new.last().unwrap());
        paged.extend(new);
        // A charge made meanwhile does not shift the pages.
        service
            .charge(&format!("between_{}", paged.len()))
            .send()
            .await;
        if page["has_more"] == false {
            break;
        }
    }
    assert_eq!(paged, made);

    let exactly = service.get("/v1/charges?limit=29").send().await.value();
    assert_eq!(
        (ids(&exactly).len(), &exactly["has_more"]),
        (29, &Value::Bool(false))
    );
    let all_but_one = service.get("/v1/charges?limit=28").send().await.value();
    assert_eq!(all_but_one["has_more"], true);
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_listed_charge_is_the_charge(pool: PgPool) {
    let service = Service::start(&pool).await;
    let made = service
        .post("/v1/charges", "order_1")
        .form("amount=700&currency=jpy&source=tok_visa&capture=false&metadata[order]=7&description=two+words")
        .send()
        .await;
    let charge = made.value();
    assert_eq!(charge["captured"], false);
    assert_eq!(charge["amount_captured"], 0);
    assert_eq!(charge["paid"], true);
    assert_eq!(
        service.get("/v1/charges").send().await.value()["data"][0],
        charge
    );
    assert_eq!(
        service
            .get(&format!("/v1/charges/{}", made.charge_id()))
            .send()
            .await
            .value(),
        charge
    );
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn lists_go_backwards_and_by_customer_and_by_time(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut made = Vec::new();
    for i in 0..12 {
        let body = serde_json::json!({"amount": 5000, "currency": "usd", "customer": format!("cus_{}", i % 3)});
        let reply = service
            .post("/v1/charges", &format!("order_{i}"))
            .json(&body)
            .send()
            .await;
        made.push(reply.charge_id());
    }
    made.reverse();
    let list = |query: String| {
        let call = service.get(&format!("/v1/charges?{query}"));
        async { call.send().await.value() }
    };
    // The three just before it, and nothing newer is left out of has_more.
    let page = list(format!("limit=3&ending_before={}", made[6])).await;
    assert_eq!(ids(&page), made[3..6]);
    assert_eq!(page["has_more"], true);
    let page = list(format!("limit=10&ending_before={}", made[6])).await;
    assert_eq!(ids(&page), made[..6]);
    assert_eq!(page["has_more"], false);

    let of_one: Vec<_> = made.iter().step_by(3).cloned().collect();
    let customer = list("customer=cus_2".to_owned()).await;
    assert_eq!(ids(&customer), of_one);
    let page = list(format!(
        "customer=cus_2&limit=2&starting_after={}",
        of_one[1]
    ))
    .await;
    assert_eq!(ids(&page), of_one[2..]);
    assert_eq!(
        ids(&list("customer=nobody".to_owned()).await),
        Vec::<String>::new()
    );

    let now = service
        .get(&format!("/v1/charges/{}", made[11]))
        .send()
        .await
        .value()["created"]
        .as_i64()
        .unwrap();
    let (before, after) = (now - 5, now + 100);
    for (query, expected) in [
        (format!("created[gte]={before}"), 12),
        (format!("created[gte]={now}"), 12),
        (format!("created[gt]={after}"), 0),
        (format!("created[lte]={after}"), 12),
        (format!("created[lt]={now}"), 0),
        (format!("created[lte]={before}"), 0),
        (format!("created[gt]={before}&created[lt]={after}"), 12),
        (format!("created%5Bgt%5D={before}&customer=cus_0"), 4),
        (format!("created={before}"), 0),
    ] {
        let page = list(format!("limit=100&{query}")).await;
        assert_eq!(ids(&page).len(), expected, "{query}");
    }
    let of_this_second = list(format!("limit=100&created={now}")).await;
    assert!(ids(&of_this_second).contains(&made[11]));
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn refunds_are_listed_by_charge(pool: PgPool) {
    let service = Service::start(&pool).await;
    let mut made = Vec::new();
    let mut charges = Vec::new();
    for order in ["a", "b"] {
        let charge = service.charge(order).send().await.charge_id();
        for i in 0..5 {
            let body = serde_json::json!({"charge": charge, "amount": 1});
            let refund = service
                .post("/v1/refunds", &format!("{order}_{i}"))
                .json(&body)
                .send()
                .await;
            made.push(refund.charge_id());
        }
        charges.push(charge);
    }
    made.reverse();
    let list = |query: String| {
        let call = service.get(&format!("/v1/refunds?{query}"));
        async { call.send().await.value() }
    };
    let all = list("limit=100".to_owned()).await;
    assert_eq!(ids(&all), made);
    assert_eq!(all["url"], "/v1/refunds");
    let of_a = list(format!("charge={}", charges[0])).await;
    assert_eq!(ids(&of_a), made[5..]);
    let page = list(format!(
        "charge={}&limit=2&starting_after={}",
        charges[0], made[6]
    ))
    .await;
    assert_eq!(
        (ids(&page).as_slice(), &page["has_more"]),
        (&made[7..9], &Value::Bool(true))
    );
    let page = list(format!(
        "charge={}&limit=1&ending_before={}",
        charges[0], made[7]
    ))
    .await;
    assert_eq!(ids(&page), made[6..7]);
    let other = service.other_account().await;
    let theirs = other
        .get(&format!("/v1/refunds?charge={}", charges[0]))
        .send()
        .await
        .value();
    assert_eq!(ids(&theirs), Vec::<String>::new());
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn a_bad_query_is_refused_by_its_name(pool: PgPool) {
    let service = Service::start(&pool).await;
    let charge = service.charge("order_1").send().await.charge_id();
    for (query, code, param) in [
        (
            "ending_before=ch_1".to_owned(),
            "resource_missing",
            "ending_before",
        ),
        (
            format!("starting_after={charge}&ending_before={charge}"),
            "parameter_invalid",
            "ending_before",
        ),
        (
            "created=yesterday".to_owned(),
            "parameter_invalid_integer",
            "created",
        ),
        (
            "created[gt]=-1".to_owned(),
            "parameter_invalid_integer",
            "created[gt]",
        ),
        (
            "created[after]=1".to_owned(),
            "parameter_unknown",
            "created[after]",
        ),
        (
            "created[gt]=1&created[gt]=2".to_owned(),
            "parameter_repeated",
            "created[gt]",
        ),
        (
            "customer=".to_owned(),
            "parameter_invalid_empty",
            "customer",
        ),
    ] {
        let reply = service.get(&format!("/v1/charges?{query}")).send().await;
        assert_eq!(reply.error_code(), code, "{query}");
        assert_eq!(reply.value()["error"]["param"], param, "{query}");
    }
    for (query, param) in [("charge=re_1", "charge"), ("customer=c", "customer")] {
        let reply = service.get(&format!("/v1/refunds?{query}")).send().await;
        assert_eq!(reply.status, 400);
        assert_eq!(reply.value()["error"]["param"], param, "{query}");
    }
}

#[sqlx::test(migrator = "payonce::MIGRATOR")]
async fn many_who_read_one_charge_at_once_all_get_it(pool: PgPool) {
    let service = Service::start(&pool).await;
    let one = service.charge("order_1").send().await.charge_id();
    let other = service.charge("order_2").send().await.charge_id();
    let nobody = "ch_01a20d6e5ab775f2a7b8c2c1d57f3b1e".to_owned();
    let stranger = service.other_account().await;
    let reads = (0..256).map(|i| {
        let (who, id, status) = match i % 4 {
            0 => (&service, &other, 200),
            1 => (&service, &nobody, 404),
            2 => (&stranger, &one, 404),
            _ => (&service, &one, 200),
        };
        let call = who.get(&format!("/v1/charges/{id}"));
        async move {
            let reply = call.send().await;
            assert_eq!(reply.status, status, "{reply:?}");
            assert!(status == 404 || reply.value()["id"] == **id);
        }
    });
    futures::future::join_all(reads).await;
}
