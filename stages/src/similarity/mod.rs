//! Stage `similarity`: for each item of a catalogue, the items whose texts are most alike.
//!
//! `reference`: the published file's layout, and its loss of the nearest neighbour: ranks 2 to `top_k` + 1, where the
//! nearest was taken for the item itself; items that share nothing fill a list up, in catalogue order. `fixed`: ranks
//! 1 to `top_k`, JSON Lines, and only items that share something; items without a text are nobody's neighbours.
//!
//! Items are embedded by the `tfidf` encoder, or as rows by a model ([`embed`]): a folder or a server.

use std::collections::BTreeMap;

use grlm_nn::nearest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    Artifact, Compat, Device, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{Item, Neighbor, Neighbors, items, jsonl, neighbors},
    compute::Dtype,
    endpoint,
    method::Method,
    model_folder,
    rows::RowJob,
    threads,
};

mod embed;
pub mod text;
pub mod tfidf;

use tfidf::Tfidf;

/// Where texts are cut, unless something else is said.
const MAX_TOKENS: u32 = 512;
/// Few texts have longer tokens: what is cut off by it, a model that cuts by tokens would not have seen.
const CHARACTERS_PER_TOKEN: usize = 8;

pub struct Similarity;

/// An embedding model: a folder on this machine, or the name by which a server at `endpoint` knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingModel {
    /// A model folder, or a repository on the Hugging Face hub; with `endpoint`, the server's name for it.
    pub model: String,
    /// The revision of the repository; with `endpoint`, any word that tells one state of the model from another.
    #[serde(default)]
    pub revision: Option<String>,
    /// The type of weights and arithmetic on a GPU. On the CPU, weights of any type are computed in f32.
    #[serde(default)]
    pub dtype: Dtype,
    /// How token vectors become one: as the model was trained, unless given; `reference` takes the mean.
    #[serde(default)]
    pub pooling: Option<Pooling>,
    /// Texts are cut to this many tokens, special ones included: 512 unless given, or fewer where the model's
    /// `sentence_bert_config.json` says so. With `endpoint`, whose tokens are not known here, to eight times as many
    /// characters; a server that refuses long texts has to be told to cut them, by `extra_body`.
    #[serde(default)]
    pub max_tokens: Option<u32>,
    /// What every text begins with, such as E5's `query: `.
    #[serde(default)]
    pub prefix: String,
    /// The address of a server that speaks OpenAI's `/v1/embeddings`, such as `http://localhost:8000/v1`.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// The environment variable that holds the server's key; declare it at the stage: `secrets: [NAME]`.
    #[serde(default)]
    pub api_key_env: Option<String>,
    /// Requests to the server that are under way at once.
    #[serde(default = "endpoint::concurrency")]
    pub concurrency: usize,
    /// Seconds in which a whole answer must have come.
    #[serde(default = "endpoint::timeout")]
    pub timeout: f64,
    /// How often a request that failed is tried again.
    #[serde(default = "endpoint::retries")]
    pub retries: u32,
    /// Further fields of each request, as the server knows them; `null` takes one of ours away.
    #[serde(default)]
    pub extra_body: Map<String, Value>,
}

impl EmbeddingModel {
    fn name(&self) -> String {
        model_folder::name(&self.model, self.revision.as_deref())
    }

    fn endpoint_settings(&self) -> endpoint::Settings {
        endpoint::Settings {
            api_key_env: self.api_key_env.clone(),
            concurrency: self.concurrency,
            timeout: self.timeout,
            retries: self.retries,
            extra_body: self.extra_body.clone(),
        }
    }

    fn check(&self) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if self.model.trim().is_empty() {
            issues.push(ParamIssue::new("encoder.model", "the model has no name"));
        }
        if self.max_tokens == Some(0) {
            issues.push(ParamIssue::new("encoder.max_tokens", "must be at least 1"));
        }
        if self.endpoint.is_some() {
            let theirs = [("pooling", self.pooling.is_some()), ("dtype", self.dtype != Dtype::default())];
            for (name, _) in theirs.into_iter().filter(|(_, given)| *given) {
                let message = "is the server's to say: it has no meaning beside `endpoint`";
                issues.push(ParamIssue::new(format!("encoder.{name}"), message));
            }
        }
        issues.extend(self.endpoint_settings().check("encoder", self.endpoint.as_deref()));
        if self.endpoint.is_none() && issues.is_empty() {
            issues.extend(model_folder::issue(embed::PLACE, &self.name()));
        }
        issues
    }

    /// What the model is given of an item's text.
    fn given(&self, text: &str) -> String {
        let mut text = self.prefix.clone() + text;
        let most = self.max_tokens.unwrap_or(MAX_TOKENS) as usize * CHARACTERS_PER_TOKEN;
        if self.endpoint.is_some()
            && let Some((end, _)) = text.char_indices().nth(most)
        {
            text.truncate(end);
        }
        text
    }

    /// With what `reference` means where nothing is said.
    fn in_compat(&self, compat: Compat) -> Self {
        let mut model = self.clone();
        if compat.is_reference() && model.endpoint.is_none() {
            model.pooling.get_or_insert(Pooling::Mean);
            model.max_tokens.get_or_insert(MAX_TOKENS);
        }
        model
    }
}

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The mean over all tokens.
    Mean,
    /// The last token's.
    Last,
    /// The first token's.
    Cls,
}

/// Parameters of `similarity`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// What makes a vector of an item's text: `tfidf`, `{ model: FOLDER, pooling, max_tokens, … }`, or
    /// `{ endpoint: URL, model: NAME, … }`.
    pub encoder: Method<Tfidf, EmbeddingModel>,
    /// Neighbours of each item.
    pub top_k: usize,
    /// How many items may be left without neighbours because the model had no answer for them.
    pub max_failed_rows: usize,
    /// Which behaviour to follow where the published script is known to be wrong.
    pub compat: Compat,
}

impl Default for Params {
    fn default() -> Self {
        Self { encoder: Method::default(), top_k: 20, max_failed_rows: 0, compat: Compat::Fixed }
    }
}

impl Stage for Similarity {
    const KIND: &'static str = "similarity";
    const SUMMARY: &'static str = "the most similar items of each item, by their texts";
    const FLOATING_POINT: bool = true;
    const SHRINKS: bool = true;
    type Params = Params;

    fn ports(params: &Params) -> Ports {
        let file = if params.compat.is_reference() { "similarities.json" } else { "neighbors.jsonl" };
        Ports::new(
            [Input::required("items", Artifact::Items, "the catalogue")],
            [Output::new("neighbors", Artifact::Neighbors, file, "each item's neighbours, best first")],
        )
    }

    fn resources(params: &Params) -> Resources {
        match &params.encoder {
            Method::BuiltIn(_) => Resources::cpus(2),
            Method::Model(model) => model_folder::resources(model.endpoint.is_some()),
        }
    }

    fn models(params: &Params) -> BTreeMap<String, String> {
        match &params.encoder {
            Method::Model(model) if model.endpoint.is_none() => [(embed::PLACE.to_owned(), model.name())].into(),
            _ => BTreeMap::new(),
        }
    }

    fn secrets(params: &Params) -> BTreeMap<String, String> {
        match &params.encoder {
            Method::Model(model) => endpoint::secret("encoder", model.api_key_env.as_deref()),
            Method::BuiltIn(_) => BTreeMap::new(),
        }
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = match &params.encoder {
            Method::BuiltIn(tfidf) => tfidf.check(),
            Method::Model(model) => model.check(),
        };
        if params.top_k == 0 || params.top_k > 10_000 {
            issues.push(ParamIssue::new("top_k", "must be from 1 to 10000"));
        }
        issues
    }

    fn plan_rows(params: &Params, cx: &mut StageContext) -> Result<Option<RowJob>, StageError> {
        let Method::Model(model) = &params.encoder else { return Ok(None) };
        let identity = match &model.endpoint {
            Some(_) => Some(String::new()),
            None => cx.model_identity_at_hand(embed::PLACE, &model.name())?,
        };
        let Some(identity) = identity else { return Ok(None) };
        let (texts, _) = texts(&items::read(cx.input("items")?)?, model, params.compat);
        let device = model.dtype.key(cx);
        Ok(Some(embed::job(&model.in_compat(params.compat), &identity, device, &texts)))
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let items = items::read(cx.input("items")?)?;
        let reference = params.compat.is_reference();
        let wanted = params.top_k + usize::from(reference);
        let mut found = match &params.encoder {
            Method::BuiltIn(tfidf) => threads::pool(cx)?.install(|| tfidf::top_k(&tfidf.encode(&items), wanted)),
            Method::Model(model) => by_model(params, model, cx, &items, wanted)?,
        };
        if reference {
            for (own, row) in found.iter_mut().enumerate() {
                fill_up(row, own, wanted.min(items.len() - 1), items.len());
                if !row.is_empty() {
                    row.remove(0);
                }
            }
        }
        let alone = found.iter().filter(|row| row.is_empty()).count();
        if alone > 0 {
            cx.info(format!(
                "{alone} of {} items have no neighbour: their text is missing or unlike any other",
                items.len()
            ));
        }
        let all: Vec<Neighbors> = items
            .iter()
            .zip(found)
            .map(|(item, row)| Neighbors {
                id: item.id.clone(),
                neighbors: row
                    .into_iter()
                    .map(|(i, score)| Neighbor { id: items[i as usize].id.clone(), score: written(score, reference) })
                    .collect(),
            })
            .collect();
        let path = cx.output("neighbors")?;
        if reference { neighbors::write_reference(path, &all) } else { jsonl::write(path, &all) }
    }
}

/// The texts that a model is given, and the item of each. `fixed` leaves out items without a text.
fn texts(items: &[Item], model: &EmbeddingModel, compat: Compat) -> (Vec<String>, Vec<usize>) {
    let texts = items.iter().enumerate().filter_map(|(place, item)| {
        let text = text::item_text(item, compat);
        (compat.is_reference() || !text.is_empty()).then(|| (model.given(&text), place))
    });
    texts.unzip()
}

/// The `wanted` nearest items of each, by a model's vectors.
fn by_model(
    params: &Params,
    model: &EmbeddingModel,
    cx: &mut StageContext,
    items: &[Item],
    wanted: usize,
) -> Result<Vec<Vec<(u32, f32)>>, StageError> {
    let (texts, places) = texts(items, model, params.compat);
    let embedded = embed::embed(cx, &model.in_compat(params.compat), &texts, params.max_failed_rows)?;
    let place = Dtype::F32.on(cx.devices().first().copied().unwrap_or(Device::Cpu));
    let near = threads::pool(cx)?.install(|| nearest::top_k_on(place, &embedded.vectors, embedded.width, wanted))?;
    let place = |row: usize| places[embedded.texts[row]];
    let mut found = vec![Vec::new(); items.len()];
    for (row, near) in near.into_iter().enumerate() {
        found[place(row)] = near.into_iter().map(|(other, score)| (place(other as usize) as u32, score)).collect();
    }
    Ok(found)
}

/// Adds items that share nothing, in catalogue order, until `row` has `wanted`.
fn fill_up(row: &mut Vec<(u32, f32)>, own: usize, wanted: usize, items: usize) {
    let mut next = 0;
    while row.len() < wanted && next < items {
        let index = next as u32;
        if next != own && row.iter().all(|(i, _)| *i != index) {
            row.push((index, 0.0));
        }
        next += 1;
    }
}

/// Six digits are more than the arithmetic is worth; the published file has them all.
fn written(score: f32, reference: bool) -> f64 {
    let score = f64::from(score);
    if reference { score } else { (score * 1e6).round() / 1e6 }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{
        endpoint::server::{Reply, Request, Server},
        rows::MemoryMemo,
        testing::{Bench, refuses, run, run_on, shared_data},
    };

    const ITEMS: &str = r#"{"id":"a","title":"red soap bar"}
{"id":"b","title":"red soap"}
{"id":"c","title":"blue gel"}
{"id":"d","title":"blue gel soap"}
{"id":"e"}
"#;

    fn ids(value: &Value, key: &str) -> Vec<String> {
        value.as_array().unwrap().iter().map(|n| n[key].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn fixed_keeps_the_nearest() {
        let ran = run("similarity", json!({"top_k": 2}), &[("items", ITEMS)]).unwrap();
        let lines = ran.lines("neighbors");
        assert_eq!(lines.iter().map(|l| l["id"].as_str().unwrap()).collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
        assert_eq!(ids(&lines[0]["neighbors"], "id"), ["b", "d"]);
        assert_eq!(lines[0]["neighbors"][0]["score"], 1.0);
        assert_eq!(lines[4]["neighbors"], json!([]));
        assert!(ran.logs()[0].contains("1 of 5 items"));
    }

    #[test]
    fn the_reference_loses_the_nearest_and_fills_up() {
        let with = json!({"top_k": 2, "compat": "reference"});
        let ran = run("similarity", with, &[("items", ITEMS)]).unwrap();
        assert_eq!(ids(&ran.json("neighbors")["a"], "item_id"), ["d", "c"]);
        assert_eq!(ids(&ran.json("neighbors")["e"], "item_id"), ["b", "c"]);
        assert!(
            ran.text("neighbors")
                .starts_with("{\n  \"a\": [\n    {\n      \"item_id\": \"d\",\n      \"similarity\": 0.")
        );
    }

    #[test]
    fn the_same_bytes_on_any_number_of_threads() {
        let Some(data) = shared_data() else { return };
        let text = std::fs::read_to_string(data.join("data/industrial/industrial.item.json")).unwrap();
        let on = |threads| run_on(threads, "similarity", json!({}), &[("items", &text)]).unwrap().text("neighbors");
        let one = on(1);
        assert_eq!(one.lines().count(), 3686);
        assert_eq!(one, on(3));
    }

    fn tiny(name: &str) -> String {
        format!("{}/nn/tests/fixtures/encoders/{name}", env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn a_model_folder_embeds_and_items_without_text_stay_alone() {
        for name in ["bert", "qwen3"] {
            let with = json!({"encoder": {"model": tiny(name), "max_tokens": 40}, "top_k": 10});
            let ran = run("similarity", with.clone(), &[("items", ITEMS)]).unwrap();
            let lines = ran.lines("neighbors");
            // Four items with text are neighbours of each other.
            assert_eq!(
                lines.iter().map(|l| l["neighbors"].as_array().unwrap().len()).collect::<Vec<_>>(),
                [3, 3, 3, 3, 0]
            );
            let same = run_on(3, "similarity", with, &[("items", ITEMS)]).unwrap();
            assert_eq!(same.text("neighbors"), ran.text("neighbors"));
        }
        let with = json!({"encoder": {"model": tiny("qwen3")}, "top_k": 2, "compat": "reference"});
        let ran = run("similarity", with, &[("items", ITEMS)]).unwrap();
        assert_eq!(ids(&ran.json("neighbors")["a"], "item_id").len(), 2);
        let stage = crate::kind("similarity").unwrap();
        let with = stage.resolve_params(&json!({"encoder": {"model": "Qwen/Qwen3-Embedding-8B", "revision": "v1"}}));
        let named = stage.models(&with.unwrap()).unwrap();
        assert_eq!(named.get("encoder.model").map(String::as_str), Some("Qwen/Qwen3-Embedding-8B@v1"));
    }

    /// A BGE pools by its first token, and `AutoModel.from_pretrained` fetches no file that says so.
    #[test]
    fn a_model_that_was_fetched_without_its_pooling_is_refused() {
        let cache = tempfile::tempdir().unwrap();
        let snapshot = cache.path().join("models--org--bge/snapshots/0123456789abcdef0123456789abcdef01234567");
        std::fs::create_dir_all(&snapshot).unwrap();
        for file in ["config.json", "tokenizer.json", "model.safetensors"] {
            std::fs::copy(format!("{}/{file}", tiny("bert")), snapshot.join(file)).unwrap();
        }
        let mut with = json!({"encoder": {"model": snapshot}, "top_k": 2});
        refuses(run("similarity", with.clone(), &[("items", ITEMS)]), &["how it pools", "`pooling`"]);
        with["encoder"]["pooling"] = json!("cls");
        run("similarity", with, &[("items", ITEMS)]).unwrap();
    }

    /// A vector that says how many letters `e` and `l` a text has.
    fn letters(text: &str) -> Value {
        let count = |letter| text.matches(letter).count() as f64;
        json!([count('e') + 0.1, count('l') + 0.1, 2.0])
    }

    fn embeddings(request: &Request) -> Value {
        let texts = request.body["input"].as_array().unwrap();
        let one =
            |(index, text): (usize, &Value)| json!({"index": index, "embedding": letters(text.as_str().unwrap())});
        let mut data: Vec<Value> = texts.iter().enumerate().map(one).collect();
        // Servers may answer in any order.
        data.reverse();
        json!({"object": "list", "data": data})
    }

    /// 70 different titles, each a vector of its own: one that is lost, swapped or asked for twice shows.
    #[test]
    fn a_server_embeds_whatever_it_does_in_between() {
        let items: String = (0..70)
            .map(|i| format!("{}\n", json!({"id": i.to_string(), "title": "e".repeat(i + 1) + &"l".repeat(70 - i)})))
            .collect();
        let server = Server::start(|request| match request.number {
            0 => Reply::Status(429, "retry-after: 0.05", json!({})),
            1 => Reply::Status(502, "", json!({})),
            2 => Reply::Half(embeddings(request)),
            3 => Reply::Text("no"),
            4 => {
                let mut short = embeddings(request);
                short["data"].as_array_mut().unwrap().pop();
                Reply::Json(short)
            }
            5 => Reply::Hang,
            6 => Reply::Json(json!({"data": [{"index": 0, "embedding": ["x"]}]})),
            7 | 8 => Reply::Slow(std::time::Duration::from_millis(200), embeddings(request)),
            _ => Reply::Json(embeddings(request)),
        });
        let with = |url: &str| json!({"encoder": {"endpoint": url, "model": "m", "timeout": 1.0, "retries": 7, "concurrency": 2}, "top_k": 2});
        let memo = MemoryMemo::default();
        let bench = Bench::new().input("items", &items).memo(&memo);
        let ran = bench.run("similarity", with(&server.url())).unwrap();
        assert_eq!((memo.len("embedding"), memo.appended()), (70, 70));
        for (i, line) in ran.lines("neighbors").iter().enumerate() {
            let near: Vec<usize> = ids(&line["neighbors"], "id").iter().map(|id| id.parse().unwrap()).collect();
            assert!(near.iter().all(|&other| other.abs_diff(i) <= 2 && other != i), "{i}: {near:?}");
        }
        let report = ran.logs().into_iter().find(|line| line.contains("tried again")).unwrap().to_owned();
        assert!(report.contains("7 tried again") && report.contains("2 × another answer"), "{report}");
        let seen = server.seen();
        let mut asked: Vec<&str> = seen.iter().flat_map(|request| texts_of(request)).collect();
        let requests = seen.len() - 7;
        assert!((5..=12).contains(&requests), "{requests}");
        // Those of the seven failures were asked for again, and nothing else twice.
        let failed: usize = seen[..7].iter().map(|request| texts_of(request).len()).sum();
        assert_eq!(asked.len(), 70 + failed);
        asked.sort_unstable();
        asked.dedup();
        assert_eq!(asked.len(), 70);
        assert_eq!(seen[0].path, "/v1/embeddings");
        // Everything is known: neither the server nor its key is needed.
        drop(server);
        let mut with = with("http://127.0.0.1:9/v1");
        with["encoder"]["api_key_env"] = json!("GRLM_TEST_NO_SUCH_KEY");
        assert_eq!(bench.run("similarity", with).unwrap().text("neighbors"), ran.text("neighbors"));
    }

    /// The first answer comes when all others have come and are kept.
    #[test]
    fn a_slow_answer_holds_up_no_other() {
        let memo = MemoryMemo::default();
        let kept = memo.clone();
        let server = Server::start(move |request| {
            let others = 100 - texts_of(request).len();
            let start = std::time::Instant::now();
            while request.number == 0 && kept.len("embedding") < others && start.elapsed().as_secs() < 10 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            match request.number == 0 && kept.len("embedding") < others {
                true => Reply::Status(401, "", json!("the others wait")),
                false => Reply::Json(embeddings(request)),
            }
        });
        let items: String = (0..100).map(|i| format!("{}\n", json!({"id": i, "title": format!("el {i}")}))).collect();
        let with = json!({"encoder": {"endpoint": server.url(), "model": "m", "concurrency": 2}, "top_k": 1});
        Bench::new().input("items", &items).memo(&memo).run("similarity", with).unwrap();
        assert_eq!((memo.len("embedding"), memo.appended()), (100, 100));
    }

    fn texts_of(request: &Request) -> Vec<&str> {
        request.body["input"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
    }

    /// Whatever the server says: that it is too long, or that something went wrong inside.
    #[test]
    fn one_text_over_which_a_server_stumbles_leaves_the_others() {
        for status in [400, 500] {
            let server = Server::start(move |request| match texts_of(request).contains(&"Title: blue gel") {
                true => Reply::Status(status, "", json!({"error": {"message": "too blue"}})),
                false => Reply::Json(embeddings(request)),
            });
            let mut with = json!({
                "encoder": {"endpoint": server.url(), "model": "m", "retries": 1, "concurrency": 1}, "top_k": 3,
            });
            let error = run("similarity", with.clone(), &[("items", ITEMS)]).unwrap_err();
            let said = error.to_string();
            assert!(said.contains("1 of 4 items failed") && said.contains("too blue"), "{said}");
            // The four together, again where that may help, and each alone once.
            assert_eq!(server.seen().len(), if status == 400 { 1 + 4 } else { 2 + 4 });
            with["max_failed_rows"] = json!(1);
            let ran = run("similarity", with, &[("items", ITEMS)]).unwrap();
            let counts = |l: &Value| l["neighbors"].as_array().unwrap().len();
            assert_eq!(ran.lines("neighbors").iter().map(counts).collect::<Vec<_>>(), [2, 2, 0, 2, 0]);
        }
    }

    #[test]
    fn a_vector_of_zeros_is_near_to_nothing() {
        let server = Server::start(|request| {
            let mut answer = embeddings(request);
            for one in answer["data"].as_array_mut().unwrap() {
                if texts_of(request)[one["index"].as_u64().unwrap() as usize] == "Title: blue gel" {
                    one["embedding"] = json!([0.0, 0.0, 0.0]);
                }
            }
            Reply::Json(answer)
        });
        let with = json!({"encoder": {"endpoint": server.url(), "model": "m"}, "top_k": 3});
        let ran = run("similarity", with, &[("items", ITEMS)]).unwrap();
        let counts = |l: &Value| l["neighbors"].as_array().unwrap().len();
        assert_eq!(ran.lines("neighbors").iter().map(counts).collect::<Vec<_>>(), [2, 2, 0, 2, 0]);
        assert!(ran.logs().iter().any(|line| line.contains("vectors of 1 texts are zero")), "{:?}", ran.logs());
    }

    #[test]
    fn a_server_is_not_sent_more_of_a_text_than_its_model_may_see() {
        let server = Server::start(|request| Reply::Json(embeddings(request)));
        let items =
            format!("{}\n{}\n", json!({"id": "a", "title": "é".repeat(100)}), json!({"id": "b", "title": "el"}));
        let with = json!({"encoder": {"endpoint": server.url(), "model": "m", "max_tokens": 4}, "top_k": 1});
        run("similarity", with, &[("items", &items)]).unwrap();
        let mut seen: Vec<String> = server.seen().iter().flat_map(texts_of).map(str::to_owned).collect();
        seen.sort();
        assert_eq!(seen, ["Title: el".to_owned(), format!("Title: {}", "é".repeat(25))]);
    }

    #[test]
    fn bad_input_and_parameters() {
        refuses(run("similarity", json!({}), &[("items", "")]), &["empty"]);
        refuses(run("similarity", json!({}), &[("items", &ITEMS[..40])]), &["input-items:2"]);
        let stage = crate::kind("similarity").unwrap();
        for (with, path) in [
            (json!({"top_k": 0}), "top_k"),
            (json!({"encoder": {"tfidf": {"max_df": 2}}}), "encoder.tfidf.max_df"),
            (json!({"encoder": "tfdif"}), "encoder"),
            (json!({"encoder": {"model": " "}}), "encoder.model"),
            (json!({"encoder": {"model": "/no/such/folder"}}), "encoder.model"),
            (json!({"encoder": {"model": "m", "max_tokens": 0}}), "encoder.max_tokens"),
            (json!({"encoder": {"model": "m", "endpoint": "h:80"}}), "encoder.endpoint"),
            (json!({"encoder": {"model": "m", "endpoint": "http://h/v1", "pooling": "cls"}}), "encoder.pooling"),
            (json!({"encoder": {"model": "m", "endpoint": "http://h/v1", "dtype": "f16"}}), "encoder.dtype"),
            (json!({"encoder": {"model": tiny("bert"), "concurrency": 4}}), "encoder.concurrency"),
        ] {
            assert_eq!(stage.resolve_params(&with).unwrap_err()[0].path, path);
        }
    }
}
