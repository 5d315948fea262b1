// SPDX-License-Identifier: GPL-2.0-or-later

//! `docs/netlink/remus.yaml` and `kmod/core/uapi.rs` say the same, in both directions; and this test
//! would notice if they did not.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};

use remus_core::uapi::{self, Command, Type};
use yaml_rust2::{Yaml, YamlLoader};

const SPEC: &str = include_str!("../../../docs/netlink/remus.yaml");
const UAPI: &str = include_str!("../../../kmod/core/uapi.rs");

fn load(spec: &str) -> Yaml {
    let mut documents = YamlLoader::load_from_str(spec).unwrap();
    assert_eq!(documents.len(), 1);
    documents.remove(0)
}

/// The name that uapi.rs has for a name of the specification.
fn constant(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

/// `pub const NAME: TYPE = VALUE;` of a module of uapi.rs ("" for the file itself), as written.
fn constants<'a>(uapi: &'a str, module: &str) -> BTreeMap<&'a str, &'a str> {
    let (body, indent) = match module {
        "" => (uapi, ""),
        _ => {
            let start = format!("\npub mod {module} {{\n");
            let Some((_, body)) = uapi.split_once(&start) else {
                return BTreeMap::new();
            };
            (body.split_once("\n}").map_or("", |b| b.0), "    ")
        }
    };
    let start = format!("{indent}pub const ");
    body.lines()
        .filter_map(|line| line.strip_prefix(&start))
        .map(|line| {
            let (name, rest) = line.split_once(':').unwrap();
            let value = rest.split_once('=').map_or("", |r| r.1);
            (name, value.trim().trim_end_matches(';'))
        })
        .collect()
}

/// What an enumeration or a list of the specification numbers consecutively.
fn numbered(list: &[Yaml], first: i64) -> Vec<(String, i64)> {
    let mut next = first;
    list.iter()
        .map(|item| {
            let name = item["name"].as_str().or(item.as_str()).unwrap_or("?");
            let number = item["value"].as_i64().unwrap_or(next);
            next = number + 1;
            (name.to_owned(), number)
        })
        .collect()
}

/// All that is different.
struct Differences(Vec<String>);

impl Differences {
    fn same<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, spec: T, uapi: T) {
        if spec != uapi {
            self.0.push(format!(
                "{what}: {spec:?} in the specification, {uapi:?} in uapi.rs"
            ));
        }
    }

    /// Names and numbers of a list, and a module of uapi.rs.
    fn module(&mut self, uapi: &str, module: &str, spec: &[(String, i64)], with_max: bool) {
        let mut want: BTreeMap<String, String> = spec
            .iter()
            .map(|(name, number)| (constant(name), number.to_string()))
            .collect();
        self.same(&format!("names in {module}"), want.len(), spec.len());
        if let (true, Some((last, _))) = (with_max, spec.last()) {
            want.insert("MAX".to_owned(), constant(last));
        }
        let have = constants(uapi, module)
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        self.same(module, want, have);
    }
}

fn differences(spec: &Yaml, uapi: &str) -> Vec<String> {
    let mut all = Differences(Vec::new());
    let strings = |list: &Yaml| -> Vec<String> {
        let list = list.as_vec().cloned().unwrap_or_default();
        list.iter()
            .map(|s| s.as_str().unwrap_or("?").to_owned())
            .collect()
    };
    let keys = |map: &Yaml| -> Vec<String> {
        let map = map.as_hash().cloned().unwrap_or_default();
        map.keys()
            .map(|k| k.as_str().unwrap_or("?").to_owned())
            .collect()
    };

    all.same("family", spec["name"].as_str(), Some(uapi::FAMILY));
    all.same("protocol", spec["protocol"].as_str(), Some("genetlink"));
    // That protocol level has no versions: it is always 1.
    all.same("version", 1, uapi::VERSION);
    all.same(
        "what there is",
        keys(spec),
        [
            "name",
            "protocol",
            "doc",
            "definitions",
            "attribute-sets",
            "operations",
            "mcast-groups",
        ]
        .map(str::to_owned)
        .to_vec(),
    );

    // Constants and enumerations.
    let mut top: BTreeSet<String> = ["FAMILY", "VERSION", "EVENTS", "TYPES", "COMMANDS"]
        .map(str::to_owned)
        .into();
    // tca and ram have their source in uapi.rs.
    let mut modules: BTreeSet<String> = ["attr", "cmd", "ram", "tca"].map(str::to_owned).into();
    let mut limits = BTreeMap::new();
    for definition in spec["definitions"].as_vec().unwrap() {
        let name = definition["name"].as_str().unwrap();
        match definition["type"].as_str() {
            Some("const") => {
                top.insert(constant(name));
                let value = definition["value"].as_i64();
                limits.insert(name, value);
                let ours = match name {
                    "name-max" => Some(uapi::NAME_MAX as i64),
                    "memory-max" => Some(uapi::MEMORY_MAX as i64),
                    _ => None,
                };
                all.same(name, value, ours);
            }
            Some("enum") => {
                let name = module_name(name);
                let entries = definition["entries"].as_vec().unwrap();
                let first = definition["value-start"].as_i64().unwrap_or(0);
                all.module(uapi, &name, &numbered(entries, first), false);
                modules.insert(name);
            }
            other => all.same(name, other, None),
        }
    }
    let have = constants(uapi, "").into_keys().map(str::to_owned).collect();
    all.same("constants", top, have);
    let have = uapi
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(" {"))
        .map(str::to_owned)
        .collect();
    all.same("modules", &modules, &have);

    // Attributes and their types.
    let sets = spec["attribute-sets"].as_vec().unwrap();
    all.same("attribute sets", sets.len(), 1);
    let Some(set) = sets.first() else {
        return all.0;
    };
    let list = set["attributes"].as_vec().unwrap();
    let set = set["name"].as_str().unwrap();
    let attributes = numbered(list, 1);
    all.module(uapi, "attr", &attributes, true);
    let types: Vec<Option<Type>> = list
        .iter()
        .map(|attribute| {
            let max = &attribute["checks"]["max-len"];
            match attribute["type"].as_str()? {
                "uint" => Some(Type::Uint),
                "flag" => Some(Type::Flag),
                "string" if max.is_badvalue() => Some(Type::Text(None)),
                "string" => {
                    let max = max.as_i64().or(*limits.get(max.as_str()?)?)?;
                    Some(Type::Text(Some(max as usize)))
                }
                _ => None,
            }
        })
        .collect();
    all.same("types", types, uapi::TYPES.map(Some).to_vec());
    for attribute in list {
        for key in keys(attribute) {
            let known = ["name", "type", "enum", "checks", "doc", "value"].contains(&key.as_str());
            all.same(&key, known, true);
        }
        for key in keys(&attribute["checks"]) {
            all.same("a check", key, "max-len".to_owned());
        }
        if let Some(name) = attribute["enum"].as_str() {
            all.same(name, modules.contains(&module_name(name)), true);
        }
    }
    let number = |name: &String| {
        let found = attributes.iter().find(|(n, _)| n == name);
        found.map_or(0, |(_, number)| *number as u16)
    };

    // Commands, what they accept, and events.
    all.same(
        "of operations",
        keys(&spec["operations"]),
        vec!["list".to_owned()],
    );
    let list = spec["operations"]["list"].as_vec().unwrap();
    let operations = numbered(list, 1);
    all.module(uapi, "cmd", &operations, true);
    let groups: Vec<Option<&str>> = spec["mcast-groups"]["list"]
        .as_vec()
        .unwrap()
        .iter()
        .map(|g| g["name"].as_str())
        .collect();
    all.same("multicast groups", groups, vec![Some(uapi::EVENTS)]);
    let mut commands = uapi::COMMANDS.iter();
    for (operation, (name, value)) in list.iter().zip(&operations) {
        all.same(name, operation["attribute-set"].as_str(), Some(set));
        let mut replies = Vec::new();
        if operation["event"].is_badvalue() {
            for key in keys(operation) {
                let known = [
                    "name",
                    "doc",
                    "attribute-set",
                    "flags",
                    "do",
                    "dump",
                    "value",
                ]
                .contains(&key.as_str());
                all.same(&format!("{name}: {key}"), known, true);
            }
            all.same(
                &format!("{name}: flags"),
                strings(&operation["flags"]),
                vec!["admin-perm".to_owned()],
            );
            let accepts = |way: &str| -> Option<BTreeSet<u16>> {
                let way = &operation[way];
                (!way.is_badvalue()).then(|| {
                    let names = strings(&way["request"]["attributes"]);
                    names.iter().map(number).collect()
                })
            };
            let ours = commands.next();
            all.same(name, Some(*value), ours.map(|c| i64::from(c.number)));
            let ours = ours.map(|c: &Command| {
                let set = c.accepts.iter().copied().collect::<BTreeSet<_>>();
                (c.one.then(|| set.clone()), c.dump.then_some(set))
            });
            all.same(name, Some((accepts("do"), accepts("dump"))), ours);
            for way in ["do", "dump"] {
                for key in keys(&operation[way]) {
                    let known = ["request", "reply"].contains(&key.as_str());
                    all.same(&format!("{name}: {way}: {key}"), known, true);
                    all.same(
                        &format!("{name}: {way}: {key}"),
                        keys(&operation[way][key.as_str()]),
                        vec!["attributes".to_owned()],
                    );
                }
                replies.extend(strings(&operation[way]["reply"]["attributes"]));
            }
        } else {
            all.same(
                &format!("event {name}"),
                keys(operation),
                ["name", "doc", "attribute-set", "mcgrp", "event"]
                    .map(str::to_owned)
                    .to_vec(),
            );
            all.same(
                &format!("group of {name}"),
                operation["mcgrp"].as_str(),
                Some(uapi::EVENTS),
            );
            all.same(
                &format!("event {name}"),
                keys(&operation["event"]),
                vec!["attributes".to_owned()],
            );
            replies.extend(strings(&operation["event"]["attributes"]));
        }
        // What is sent is not in uapi.rs; the kernel tests look at it.
        for attribute in replies {
            all.same(
                &format!("{name}: {attribute}"),
                number(&attribute) != 0,
                true,
            );
        }
    }
    all.same("commands", commands.next().map(|c| c.number), None);
    all.0
}

/// Where the numbers of an enumeration are.
fn module_name(name: &str) -> String {
    name.replace('-', "_")
}

#[test]
fn same() {
    let all = differences(&load(SPEC), UAPI);
    assert!(all.is_empty(), "{all:#?}");
}

/// Every way to change one word or number of the specification, to leave an entry out, or to have it
/// twice: (what, the changed copy).
fn mutants(node: &Yaml, path: &str, out: &mut Vec<(String, Yaml)>) {
    match node {
        Yaml::Hash(map) => {
            for (key, value) in map {
                let key_name = key.as_str().unwrap();
                if key_name == "doc" {
                    continue;
                }
                let path = format!("{path}/{key_name}");
                let mut inner = Vec::new();
                mutants(value, &path, &mut inner);
                for (what, changed) in inner {
                    let mut copy = map.clone();
                    copy[key] = changed;
                    out.push((what, Yaml::Hash(copy)));
                }
            }
        }
        Yaml::Array(list) => {
            // What is sent may change without uapi.rs.
            let free = path.contains("/reply/") || path.contains("/event/");
            for (i, value) in list.iter().enumerate() {
                let path = format!("{path}/{i}");
                let mut inner = Vec::new();
                mutants(value, &path, &mut inner);
                for (what, changed) in inner {
                    let mut copy = list.clone();
                    copy[i] = changed;
                    out.push((what, Yaml::Array(copy)));
                }
                if !free {
                    let mut copy = list.clone();
                    copy.remove(i);
                    out.push((format!("{path} left out"), Yaml::Array(copy)));
                }
                // A set in the specification may be in any order.
                if i > 0 && !path.contains("/attributes/") && matches!(value, Yaml::Hash(_)) {
                    let mut copy = list.clone();
                    copy.swap(i - 1, i);
                    out.push((format!("{path} one up"), Yaml::Array(copy)));
                }
            }
        }
        Yaml::String(text) => {
            out.push((format!("{path}: x{text}"), Yaml::String(format!("x{text}"))));
            for other in ["uint", "flag", "string"] {
                if path.ends_with("/type") && text != other {
                    out.push((format!("{path}: {other}"), Yaml::String(other.to_owned())));
                }
            }
        }
        Yaml::Integer(number) => {
            out.push((format!("{path}: {}", number + 1), Yaml::Integer(number + 1)));
        }
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn any_change_of_the_specification_is_noticed() {
    let spec = load(SPEC);
    let mut all = Vec::new();
    mutants(&spec, "", &mut all);
    // The order of constants says nothing.
    all.retain(|(what, _)| {
        !what.starts_with("/definitions/")
            || !what.ends_with(" one up")
            || what.contains("/entries/")
    });
    assert!(all.len() > 300, "{}", all.len());
    for (what, changed) in all {
        assert!(!differences(&changed, UAPI).is_empty(), "{what}");
    }
}

#[test]
fn any_change_of_a_number_is_noticed() {
    let spec = load(SPEC);
    let mut count = 0;
    let lines: Vec<&str> = UAPI.lines().collect();
    for (i, line) in lines.iter().enumerate() {
        let in_module = ["attr", "cmd", "cow_policy", "direction"]
            .iter()
            .any(|module| {
                let start = format!("pub mod {module} {{");
                let start = lines.iter().position(|l| **l == start).unwrap();
                let end = start + lines[start..].iter().position(|l| *l == "}").unwrap();
                (start..end).contains(&i)
            });
        if !in_module || !line.contains("pub const ") {
            continue;
        }
        for changed in [
            line.replace(';', "1;"),
            line.replace("const ", "const X"),
            String::new(),
        ] {
            let mut copy = lines.clone();
            copy[i] = &changed;
            assert!(
                !differences(&spec, &copy.join("\n")).is_empty(),
                "{changed}"
            );
            count += 1;
        }
    }
    assert!(count > 100, "{count}");
}
