#!/usr/bin/env node
// prebuildify calls this in place of node-gyp (PREBUILD_NODE_GYP): the same CMake build, whatever node-gyp arguments come with it.
import { spawnSync } from 'node:child_process'
import { createRequire } from 'node:module'

const cmakeJs = createRequire(import.meta.url).resolve('cmake-js/bin/cmake-js')
const { status } = spawnSync(process.execPath, [cmakeJs, 'build', '--log-level', 'warn'], { stdio: 'inherit' })
process.exit(status ?? 1)
